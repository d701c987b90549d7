"""The documentation does what it says: snippets run, commands are known, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from calibtrain import cli
from calibtrain.config_file import load_config
from tests.end_to_end.runs import finished_run
from tests.serving import needs_vllm, vllm_server
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(kind):
    """Every fenced block whose info string is `kind`, with its place."""
    for page in PAGES:
        for number, match in enumerate(re.finditer(r"^```([^\n]*)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)):
            if match[1].strip() == kind:
                yield pytest.param(match[2], id=f"{page.name}-{number}")


@pytest.mark.parametrize("text", blocks("python run"))
def test_python_snippets_run(text):
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", blocks("bash run"))
def test_commands_run(text, tmp_path):
    """As in a clone in which nothing was run yet."""
    write_tiny_model(tmp_path)  # the documented sizes come from another model
    for line in filter(None, text.splitlines()):
        words = shlex.split(line, comments=True)
        assert words[0] == "calibtrain"
        changes = [f"model.source={tmp_path}", f"output_dir={tmp_path / 'out'}"]
        argv = [sys.executable, "-m", "calibtrain.cli", *words[1:], *changes]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", blocks("bash run spectra"))
def test_spectra_commands_run(text, tmp_path):
    places = {"BASE": write_tiny_model(tmp_path / "base"), "TUNED": write_tiny_model(tmp_path / "tuned", seed=1)}
    for i, line in enumerate(filter(None, text.splitlines())):
        words = [str((places | {"DIR": tmp_path / str(i)}).get(word, word)) for word in shlex.split(line)]
        argv = [sys.executable, "-m", "calibtrain.cli", *words[1:]]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert list((tmp_path / str(i)).iterdir())


@pytest.mark.parametrize("text", blocks("bash run quantize"))
def test_quantize_commands_run(text, tmp_path):
    from tests.quantize_cases import tiny_run

    places = {"OUT": tiny_run(tmp_path), "MODEL": write_tiny_model(tmp_path / "hub", tied=False, hidden=64)}
    places |= {"questions.jsonl": tmp_path / "questions.jsonl", "DIR": tmp_path / "DIR"}
    for line in filter(None, text.splitlines()):
        words = [str(places.get(word, word)) for word in shlex.split(line, comments=True)]
        argv = [sys.executable, "-m", "calibtrain.cli", *words[1:]]
        if words[1] == "quantize":  # the tiny run has fewer questions
            argv += ["--samples", "16"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode in (0, 1, 3), done.stderr  # the tiny model may lose its certificate, or too much
        assert "Traceback" not in done.stderr


@pytest.mark.engine
@needs_vllm
@pytest.mark.timeout(600)
def test_commands_that_ask_a_server_run(tmp_path):
    """In the page's order, on one server; a random model is never right, so that nothing can be certified of it."""
    sizes = {"train": 8, "calibration": 8, "temperature": 24, "certification": 24, "test": 8}
    out = finished_run(tmp_path, sizes, 8)
    write_tiny_model(out / "model", hidden=128, max_position_embeddings=512)  # vLLM wants heads of 32
    with vllm_server(out / "model") as url:
        for text in blocks("bash run engine"):
            for line in filter(None, text.values[0].replace("http://127.0.0.1:8001/v1", url).splitlines()):
                words = [re.sub("^out(?=/|$)", str(out), word) for word in shlex.split(line)]
                argv = [sys.executable, "-m", "calibtrain.cli", *words[1:]]
                done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=ROOT)
                assert done.returncode == (words[1] == "calibrate"), done.stderr
        for text in blocks("python run engine"):
            code = text.values[0].replace("http://127.0.0.1:8001/v1", url).replace('"out"', repr(str(out)))
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
            assert done.returncode == 0, done.stderr
            assert "I do not know." in done.stdout


@pytest.mark.parametrize("text", blocks("yaml config"))
def test_yaml_snippets_are_valid_configs(text, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    load_config(tmp_path / "run.yaml")


def test_every_calibtrain_command_in_the_docs_exists():
    known = set(get_command(cli.app).commands)
    used = {
        match[1]
        for page in PAGES
        for match in re.finditer(r"^(?:\.venv/bin/)?calibtrain (\w+)", page.read_text("utf-8"), re.M)
    }
    assert used
    assert used <= known


def test_every_make_target_in_the_docs_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {target for page in PAGES for target in re.findall(r"^make ([a-z-]+)", page.read_text("utf-8"), re.M)}
    assert used
    assert used <= targets


def test_every_extra_that_is_named_exists():
    kept = set(re.findall(r'^ {8}"(\w+)": \[', (ROOT / "setup.py").read_text("utf-8"), re.M))
    told = [*PAGES, *(ROOT / "calibtrain").rglob("*.py")]
    named = {name for path in told for name in re.findall(r"calibtrain\[(\w+)\]", path.read_text("utf-8"))}
    table = (ROOT / "docs" / "launch.md").read_text("utf-8").partition("| extra |")[2].partition("\n\n")[0]
    named |= set(re.findall(r"^\| `(\w+)`", table, re.M))
    assert len(named) >= 5
    assert named <= kept


def test_relative_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("name", ["configuration", "losses"])
def test_pages_made_from_the_code_are_not_stale(name, tmp_path):
    made = tmp_path / "page.md"
    subprocess.run([sys.executable, str(ROOT / "docs" / f"{name}.py"), str(made)], check=True, timeout=60)
    assert made.read_text("utf-8") == (ROOT / "docs" / f"{name}.md").read_text("utf-8"), (
        f"stale: run `python docs/{name}.py`"
    )


def test_a_loss_of_ones_own_in_the_docs_trains():
    text = next(blocks("python run own loss")).values[0]
    place: dict = {}
    exec(text, place)
    from calibtrain.losses import SFTLoss
    from tests.unit.losses.batches import Example, make_batch

    stats, batch, logprob = make_batch([Example(0, -1, [], [-1.0, -2.0]), Example(2, -1, [], [-3.0], 0.0)])
    terms = place["OverconfidenceLoss"]()(stats, batch)
    assert terms["nll"].total.item() == SFTLoss()(stats, batch)["nll"].total.item()  # nothing wrong, sum_p2 is 0
    terms["nll"].total.backward()
    assert logprob.grad.tolist() == [-1.0, -1.0, 0.0]
    body = [line for line in text.split("class ")[1].splitlines() if line.strip()]
    code = [line for line in body if not line.strip().startswith(('"""', "def ", "class"))]
    assert len(code) <= 10, "the page says ten lines"
