"""Real vLLM samples rollouts by the very weights that are trained: after each step, and after it was killed in a round."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import yaml

from calibtrain.config_file import load_config
from calibtrain.engines import Draws
from calibtrain.errors import EngineFailure
from calibtrain.training.served_sampling import ServedSampling
from tests.distributed.jobs import write_job
from tests.distributed.ranks import environment, run, torchrun
from tests.serving import ENVIRONMENT, PYTHON, needs_vllm, vllm_server
from tests.tiny import tiny_tokenizer, write_tiny_model
from tests.unit.training.serving_cases import answerer_of, moved

pytestmark = [pytest.mark.engine, needs_vllm, pytest.mark.timeout(900)]

STEPS = 20
DEFAULTS = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.2, "top_k": 1, "top_p": 0.1, "min_p": 0.5}
"""Of a model's generation_config.json: what its authors recommend for answers, and no policy is sampled by."""


def job(folder, name, **engine):
    """A run of GRPO on a model that vLLM's attention on a CPU takes, heads of 32; its score moves it each step."""
    training = {"learning_rate": 3e-3, "max_steps": STEPS, "checkpoint_every": None}
    path = write_job(folder, name, penalties=[], training=training)
    config = yaml.safe_load(path.read_text())
    config["model"]["source"] = str(folder / "wide")
    config["evaluation"] = {"batch_size": 16, "max_new_tokens": 4}
    config["data"]["max_length"] = 128
    config["objective"] = {"name": "grpo"}
    config["rollouts"] = {"reward": "log", "group_size": 4, "engine": {"kind": "vllm", **engine}}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rollouts")
    write_job(path)
    write_tiny_model(path / "wide", hidden=128, initializer_range=0.2, seed=2)
    (path / "wide" / "generation_config.json").write_text(json.dumps(DEFAULTS))
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode([token]).strip() for token in range(4, len(tokenizer), 2)]
    rows = [{"question": f"What is {i}?", "answers": [text for text in texts if text]} for i in range(200)]
    (path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def logged(output: Path) -> dict[int, dict]:
    file = output / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line["step"]: line for line in lines if line["event"] == "log"}


def server_pids(output: Path) -> set[int]:
    """Processes that serve this run's weights, with those that they started."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words, group = (entry / "cmdline").read_bytes(), os.getpgid(int(entry.name))
            except OSError:
                continue
            if f"{output}/engine/start".encode() in words:
                found |= {int(entry.name), group}
    return {pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _group(pid) in found}


def _group(pid):
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def test_a_launched_server_follows_20_steps_and_its_own_death(folder):
    """Log-probs agree to 1e-2 after every push, and once more after the server was killed in a round and launched again."""
    settings = {"launch": True, "python": str(PYTHON), "arguments": ["--enforce-eager", "--max-num-seqs", "16"]}
    path = job(folder, "launched", **settings, environment=ENVIRONMENT, wait=400)
    output, killed = folder / "launched", []

    def kill_once(pid):
        if not killed and len(logged(output)) >= 8:
            killed.extend(server_pids(output))
            for one in killed:
                os.kill(one, signal.SIGKILL)
        return False

    ended = run(torchrun(2, "-m", "calibtrain.launchers.train", str(path)), folder, 800, watch=kill_once)
    assert ended.code == 0, ended.output[-5000:]
    lines = logged(output)
    assert sorted(lines) == list(range(1, STEPS + 1))
    gaps = [line["train/rollouts/engine_gap"] for line in lines.values()]
    assert max(gaps) < 1e-2, gaps
    moves = [line["train/rollouts/policy_moved"] for step, line in sorted(lines.items()) if step > 1]
    assert sorted(moves)[STEPS // 2] > 0.02, moves  # what stale weights would differ by
    assert {line["train/rollouts/staleness"] for line in lines.values()} == {0.0}
    assert killed
    assert "waiting for the server" in ended.output
    assert ended.output.count("vLLM starts at") == 2
    assert not server_pids(output)  # the second one ended with the run
    assert [one.name for one in (output / "engine").iterdir()] == ["server.log"]
    print("gaps", min(gaps), max(gaps), "moves", min(moves), max(moves))


@pytest.fixture(scope="module")
def address(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        with vllm_server(folder / "wide") as url:
            yield url


def test_stale_weights_are_an_error_and_what_a_model_recommends_is_overruled(folder, address, monkeypatch):
    path = job(folder, "proof", address=address, wait=5)
    answerer, prompts = answerer_of(load_config(path))
    served = ServedSampling(load_config(path), answerer, prompts, prompts)
    draws = Draws(prompts * 4, [100 * i for i in range(4 * len(prompts))], 8, answerer.template.stop_ids, 8)
    first = served.sample(draws, 0)
    again = served.sample(draws, 0)
    assert [[one.tokens for one in group] for group in again] == [[one.tokens for one in group] for group in first]
    said = {one.tokens for group in first for one in group}
    assert len(said) > 0.8 * len(draws.prompts) * 8  # top_k 1 would make one of each prompt
    ours = served.proof.ours
    for group, prompt in zip(first[: len(prompts)], prompts, strict=True):
        served.proof.prompts = [prompt] * len(group)
        found = ours(type("Drawn", (), {"drawn": group}))[len(prompts) :]
        for mine, its in zip(found, group, strict=True):
            assert mine == pytest.approx(its.logprobs, abs=1e-2)
    served.proof.prompts = prompts
    for step, size in enumerate((1e-2, 1e-5), start=1):  # far beyond the tolerance, and far within
        moved(answerer, size)
        served.push(2 * step)
        moved(answerer, size)
        with monkeypatch.context() as patch:
            patch.setattr(served.server.root, "post", skipping(served.server.root.post))
            with pytest.raises(EngineFailure, match="weights are stale"):
                served.push(2 * step + 1)
    served.push(9)


def skipping(post):
    return lambda path, body: None if path == "/collective_rpc" else post(path, body)


def test_a_server_that_stays_away_ends_the_run_behind_a_checkpoint(folder):
    """And before that it draws each round while the one before is trained on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        with vllm_server(folder / "wide") as url:
            path, output = job(folder, "away", address=url, wait=8, overlap=True), folder / "away"
            port = re.search(r":(\d+)/", url)[1]
            killed = []

            def kill(pid):
                if not killed and len(logged(output)) >= 3:
                    listed = {int(one) for one in os.listdir("/proc") if one.isdecimal()}
                    leaders = {one for one in listed if f"--port\0{port}\0".encode() in _cmdline(one)}
                    killed.extend(one for one in listed if _group(one) in leaders)
                    for one in killed:
                        os.kill(one, signal.SIGKILL)
                return False

            ended = run(torchrun(2, "-m", "calibtrain.launchers.train", str(path)), folder, 400, environment(), kill)
    assert killed
    assert ended.code != 0
    kept = max(int(one.name[5:]) for one in (output / "checkpoints").glob("step-*"))
    lines = logged(output)
    assert kept == max(lines)
    assert [lines[step]["train/rollouts/staleness"] for step in (1, 2, 3)] == [
        0,
        1,
        1,
    ]  # drawn while the last one trained
    assert all(line["train/rollouts/engine_gap"] < 1e-2 for line in lines.values())
    assert re.search(rf"waited 8 s .*training stopped after step {kept} of {STEPS}; checkpoint: ", ended.output)
    assert "training.resume=auto goes on from there" in ended.output


def _cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
