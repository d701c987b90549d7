"""A finished run onto the Hugging Face hub: the model, what calibrates it, its report, and a card of what was measured.

The model lies at the repository's top, as `from_pretrained` reads it, and the run's files in its folder `calibtrain`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calibtrain.config import RunConfig
from calibtrain.config_file import render_config, without_keys
from calibtrain.errors import UserError, printable
from calibtrain.pipeline.calibration_file import read_calibration, served_source, source_folder
from calibtrain.pipeline.collect import bare, report_data
from calibtrain.pipeline.model_card import model_card, start_of
from calibtrain.pipeline.outside import FILE as OUTSIDE
from calibtrain.pipeline.own_code import config_of_run
from calibtrain.pipeline.report import write_report
from calibtrain.pipeline.report_numbers import Stage, stage_of

FOLDER = "calibtrain"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npz", ".npy", ".joblib")
"""Files that run code when they are read, or may: nobody is handed one."""
KEPT = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
"""Of a model directory: weights, settings, tokenizer, and a model's own code."""
REPLACED = re.compile(rf"[^/]+\.safetensors(\.index\.json)?|adapter_config\.json|{FOLDER}/.*")
"""What an earlier push may have left: `from_pretrained` would read its weights, or its adapter, in place of these."""

REFUSALS = {
    401: "the hub knows no token of yours: run `hf auth login` with one that may write, or set HF_TOKEN",
    403: "your token may not write there: take one with write access, or a repository of your own",
    404: "no such repository, or none that your token may see",
}
"""What statuses of the hub mean to who pushes."""


@dataclass
class Push:
    """What goes up: the path in the repository of each file here; `staged` are written for it."""

    card: str
    files: dict[str, Path] = field(default_factory=dict)
    staged: dict[str, bytes] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Every file with its bytes, sorted."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        sizes |= {name: len(content) for name, content in self.staged.items()}
        return [f"{size:>14,}  {name}" for name, size in sorted(sizes.items())]


def collect(output_dir: Path, repo: str, *, adapter: bool = False, answers: bool = False) -> Push:
    """What `push` uploads of a run. Nothing is sent.

    adapter: the LoRA adapter alone. answers: also questions and answers, in the report and as files; without it what goes up
    holds none. Raises UserError where the run has not what is asked for, or a file that may hold code.
    """
    config = config_of_run(output_dir)
    made = [output_dir / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    if adapter and not all(path.is_file() for path in made):
        raise UserError(f"--adapter: {output_dir} has no adapter; a run with model.lora exports one")
    files = _model_files(output_dir / ("adapter" if adapter else "model"))
    if adapter:
        push = Push(model_card(config, repo, adapter=True), files)
        settings = json.loads(files.pop("adapter_config.json").read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = start_of(config)  # a directory of this machine's tells nobody anything
        push.staged["adapter_config.json"] = json.dumps(settings, indent=2).encode()
        return _with_card(push)
    if not (output_dir / "calibration.json").is_file():
        return _with_card(Push(model_card(config, repo), files))
    push = Push("", files)
    calibrated = read_calibration(output_dir, source=served_source(output_dir))
    _add_config(push, config, output_dir, answers=answers)
    _add_calibration(push, output_dir, answers=answers)
    push.card = model_card(config, repo, _add_report(push, output_dir, answers=answers), calibrated)
    return _with_card(push)


def _with_card(push: Push) -> Push:
    push.staged["README.md"] = push.card.encode()
    return push


def _model_files(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == "README.md":  # PEFT's form of one, which says nothing
            continue
        if path.suffix in PICKLES:
            raise UserError(f"{path}: may run code when it is read, and is not pushed; move it out of {folder}")
        if path.suffix in KEPT:
            found[path.relative_to(folder).as_posix()] = path
    return found


def _add_config(push: Push, config: RunConfig, output_dir: Path, *, answers: bool) -> None:
    """config.yaml, without what a launched server was given, where keys may stand.

    Raises UserError where prompts show questions with their answers, which nobody has asked to push.
    """
    if config.data.examples and not answers:
        raise UserError(
            f"{output_dir / 'config.yaml'}: data.examples: prompts show {len(config.data.examples)} question(s) with their "
            "answers, without which the model answers otherwise: push them with --answers"
        )
    name, bare = f"{FOLDER}/config.yaml", without_keys(config)
    if bare == config:
        push.files[name] = output_dir / "config.yaml"
    else:
        push.staged[name] = render_config(bare).encode()


def _add_calibration(push: Push, output_dir: Path, *, answers: bool) -> None:
    """calibration.json with the files that it rests on, from which `calibtrain answer` answers."""
    source = source_folder(output_dir, served_source(output_dir))
    places = {path / "calibration.json" for path in (output_dir, source)}
    for path in sorted(places):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        name = f"{FOLDER}/{path.relative_to(output_dir).as_posix()}"
        if answers:
            push.files[name] = path
        else:
            content["scope"]["examples"] = []
            push.staged[name] = json.dumps(content, indent=2).encode()
        for part in [*content["parts"], OUTSIDE]:
            file = (output_dir / part).resolve()
            if part == OUTSIDE and not file.is_file():
                continue
            if not file.is_relative_to(output_dir.resolve()) or file.suffix not in (".safetensors", ".json"):
                raise UserError(
                    f"{path}: rests on {part}, which is no safetensors or JSON file of the run; calibrate again"
                )
            push.files[f"{FOLDER}/{part}"] = file


def _add_report(push: Push, output_dir: Path, *, answers: bool) -> Sequence[Stage]:
    """report.html, and the stages that it shows; nothing of a run whose model did not answer the test questions."""
    if not (output_dir / "answers" / "test.jsonl").is_file():
        return ()
    data = report_data(output_dir)
    with TemporaryDirectory() as folder:
        page = write_report(Path(folder) / "report.html", data if answers else bare(data))
        push.staged[f"{FOLDER}/report.html"] = page.read_bytes()
    if answers:
        for path in sorted((output_dir / "answers").glob("*.jsonl")):
            push.files[f"{FOLDER}/answers/{path.name}"] = path
    return [stage for one in data.measured if (stage := stage_of(one.label, one.answers, one.confidence)).n]


def run(push: Push, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Make the repository, where there is none, and put everything into one commit. Returns its address.

    What an earlier push left there, and this one does not replace, goes with the same commit.
    The token is huggingface_hub's own (`hf auth login`, HF_TOKEN). Raises UserError for whatever the hub has against it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    api = HfApi()
    sources: dict[str, Any] = {**push.files, **push.staged}
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(f"--private: {repo} is there already and public; push to another, or make it private first")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        added = [CommitOperationAdd(name, source) for name, source in sorted(sources.items())]
        left = [one for one in api.list_repo_files(repo, revision=revision) if REPLACED.fullmatch(one)]
        gone = [CommitOperationDelete(name, is_folder=False) for name in sorted(set(left) - sources.keys())]
        done = api.create_commit(repo, [*added, *gone], commit_message="Push a run of calibtrain", revision=revision)
    except HFValidationError as error:
        raise UserError(f"REPO: {_first_line(error)}") from None
    except LocalTokenNotFoundError:
        raise UserError(f"{repo}: {REFUSALS[401]}") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{repo}: HF_HUB_OFFLINE is set, so that nothing is sent; unset it") from None
    except HfHubHTTPError as error:
        raise UserError(f"{repo}: {_refusal(error)}") from None
    except (HTTPError, OSError) as error:
        raise UserError(
            f"{repo}: {api.endpoint} cannot be reached ({type(error).__name__}); nothing was pushed"
        ) from None
    return str(done.commit_url)


def _refusal(error: Any) -> str:
    """What the hub has against it, by its status; else in its own words."""
    status = error.response.status_code
    return REFUSALS.get(status, f"the hub refused with status {status}: {_first_line(error.server_message or error)}")


def _first_line(error: object) -> str:
    return printable(str(error).strip().split("\n")[0])
