"""A run onto a hub: what goes up and what does not, the card, and what the hub has against it in one line."""

import base64
import json
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from calibtrain.cli import app
from calibtrain.config_file import dump_config, load_config
from calibtrain.errors import UserError
from calibtrain.pipeline import push as push_module
from calibtrain.pipeline.calibration_file import read_calibration
from calibtrain.pipeline.evaluate import write_measurement
from calibtrain.pipeline.model_card import model_card
from calibtrain.pipeline.push import collect, run
from tests.unit.pipeline.conftest import mark_of, measured

SECRET, TOKEN, KEY = "a-persons-own-words", "hf_onlyfortests", "the-servers-own-key"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a push asks for; weights go the way of large files."""

    def _reply(self, status, content, **headers):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        server, body = self.server, self._body()
        server.asked.append((self.path, self.headers.get("Authorization")))
        if server.refuses:
            self._reply(server.refuses, {"error": "no\nmore"})
        elif self.path == "/api/repos/create":
            server.made.append(json.loads(body))
            self._reply(200, {"url": f"{server.address}/me/mine"})
        elif "/branch/" in self.path:
            self._reply(200, {})
        elif self.path == "/api/validate-yaml":
            server.cards.append(json.loads(body)["content"])
            self._reply(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self._reply(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{server.address}/put/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._reply(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        elif "/commit/" in self.path:
            server.commits.append((self.path, [json.loads(line) for line in body.splitlines()]))
            self._reply(
                200, {"success": True, "commitOid": "c" * 40, "commitUrl": f"{server.address}/me/mine/commit/c"}
            )
        else:
            print("not known to the tests' hub:", self.path)
            self._reply(404, {"error": "not here"})

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if "/tree/" in self.path:
            self._reply(200, [{"type": "file", "path": one, "size": 1, "oid": "0"} for one in self.server.there])
            return
        self._reply(200, {"id": "me/mine", "private": self.server.private})

    def do_PUT(self):
        self.server.stored[self.path.rpartition("/")[2]] = self._body()
        self._reply(200, {})

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.refuses, server.asked, server.made, server.commits, server.stored, server.cards = 0, [], [], [], {}, []
    server.private, server.there = True, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def tested(out, monkeypatch):
    """The calibrated run with answers to the test questions."""
    whole = push_module.report_data
    monkeypatch.setattr(push_module, "report_data", lambda path: replace(whole(path), bootstrap_replicates=5))
    found = measured(300, 3)
    answers = [replace(one, question=f"{SECRET} {i}", text=SECRET) for i, one in enumerate(found.answers)]
    write_measurement(replace(found, answers=answers), out / "answers" / "test.jsonl", mark_of(out))
    content = json.loads((out / "calibration.json").read_text())
    content["scope"]["examples"] = [SECRET]
    (out / "calibration.json").write_text(json.dumps(content))
    (out / "run.json").write_text(json.dumps({"versions": {}, "git": None, "data_hash": None, "world_size": 1}))
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "mp_rank_00_model_states.pt").write_bytes(b"no")
    return out


@pytest.fixture
def untested(tested):
    """The run before its model answered the test questions, so that no report is drawn."""
    (tested / "answers" / "test.jsonl").unlink()
    return tested


def contents(push):
    return {**push.staged, **{name: path.read_bytes() for name, path in push.files.items()}}


def test_what_goes_up_is_the_model_and_what_calibrates_it_and_no_answer(tested):
    found = collect(tested, "me/mine")
    check_card(found.card, tested)
    assert set(contents(found)) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "calibtrain/calibration.json",
        "calibtrain/config.yaml",
        "calibtrain/report.html",
    }
    assert not any(SECRET.encode() in one for one in contents(found).values())
    asked = contents(collect(tested, "me/mine", answers=True))
    assert {"calibtrain/answers/test.jsonl", "calibtrain/answers/certification.jsonl"} < set(asked)
    assert SECRET.encode() in asked["calibtrain/report.html"]


def check_card(card, out):
    """What was measured and certified is in it."""
    certificate = read_calibration(out).certification.certificate
    assert f"{certificate.coverage:.1%} of them" in card
    assert "at most 10% are wrong (with 95% confidence)" in card
    rows = [line for line in card.splitlines() if line.startswith(("| fine-tuned", "| with"))]
    assert len(rows) == 2
    right = [bool(one.correct) for one in measured(300, 3).answers]
    assert all(f"| {sum(right) / 300:.1%} |" in row for row in rows)
    assert "raw model" not in card


def test_what_was_pushed_is_calibrated_where_it_is_fetched(untested, tmp_path):
    there = tmp_path / "there"
    for name, content in contents(collect(untested, "me/mine")).items():
        (there / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (there / "model" / name).write_bytes(content)
    for path in (there / "model" / "calibtrain").iterdir():  # as the card says
        shutil.move(path, there / path.name)
    found, own = read_calibration(there), read_calibration(untested)
    assert found.certification == own.certification
    assert found.calibrator == own.calibrator
    assert found.scope.examples == ()


def test_what_was_not_measured_is_not_in_the_card(untested):
    config = load_config(untested / "config.yaml")
    assert "Nothing was measured" in collect(untested, "me/mine").card
    (untested / "calibration.json").unlink()
    card = collect(untested, "me/mine").card
    assert "was not calibrated" in card
    assert "calibtrain answer" not in card
    hub = config.model_copy(update={"model": config.model.model_copy(update={"source": "Qwen/Qwen3-8B"})})
    assert 'base_model: "Qwen/Qwen3-8B"' in model_card(hub, "me/mine")
    local = config.model_copy(update={"model": config.model.model_copy(update={"source": "/home/me/start"})})
    assert "/home" not in model_card(local, "me/mine")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "sub/optim_states.pt", "x.pkl"])
def test_what_may_run_code_is_refused(untested, name):
    (untested / "model" / name).parent.mkdir(exist_ok=True)
    (untested / "model" / name).write_bytes(b"")
    with pytest.raises(UserError, match="may run code when it is read"):
        collect(untested, "me/mine")


def test_a_calibration_that_rests_on_a_file_outside_the_run_is_refused(untested):
    content = json.loads((untested / "calibration.json").read_text())
    content["parts"] = {"../secret.json": ""}
    (untested / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(UserError):
        collect(untested, "me/mine")


def test_the_adapter_goes_alone(untested):
    with pytest.raises(UserError, match="has no adapter"):
        collect(untested, "me/mine", adapter=True)
    (untested / "adapter").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        (untested / "adapter" / name).write_text(json.dumps({"base_model_name_or_path": "/home/me/start"}))
    lora = {"lora": {"load_in_4bit": True}}
    config = load_config(untested / "config.yaml", [f"model={json.dumps({'source': 'Qwen/Qwen3-8B', **lora})}"])
    dump_config(config, untested / "config.yaml")
    found = collect(untested, "me/mine", adapter=True)
    assert set(contents(found)) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert json.loads(found.staged["adapter_config.json"])["base_model_name_or_path"] == "Qwen/Qwen3-8B"
    assert "library_name: peft" in found.card
    assert 'from_pretrained("Qwen/Qwen3-8B", quantization_config=four_bits, dtype=torch.' in found.card
    assert f"bnb_4bit_compute_dtype=torch.{'bfloat16' if config.model.dtype == 'bf16' else 'float32'}" in found.card
    assert "not this adapter" in found.card


def test_everything_goes_up_in_one_commit(untested, hub):
    push = collect(untested, "me/mine")
    assert run(push, "me/mine", private=True, revision="first") == f"{hub.address}/me/mine/commit/c"
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("mine", "me")
    assert made.get("private") or made.get("visibility") == "private"  # as versions of huggingface_hub ask for it
    assert hub.cards == [push.card]
    ((path, lines),) = hub.commits
    assert path.endswith("/me/mine/commit/first")
    sent = {one["value"]["path"]: one["value"] for one in lines if one["key"] == "file"}
    large = {one["value"]["path"]: one["value"]["oid"] for one in lines if one["key"] == "lfsFile"}
    known = contents(push)
    assert set(sent) | set(large) == set(known)
    assert all(base64.b64decode(one["content"]) == known[name] for name, one in sent.items())
    assert {name: hub.stored[oid] for name, oid in large.items()} == {"model.safetensors": known["model.safetensors"]}
    # What the client asks for itself (/api/agent-harnesses, /api/validate-yaml) it may ask without.
    told = {token for path, token in hub.asked if "mine" in path or path.startswith("/api/repos")}
    assert told == {f"Bearer {TOKEN}"}


def test_what_an_earlier_push_left_is_not_read_in_place_of_this_one(untested, hub):
    """transformers reads one file of weights before several, and an adapter before either."""
    stale = ["adapter_config.json", "model-00001-of-00002.safetensors", "calibtrain/answers/test.jsonl"]
    hub.there = [*stale, "model.safetensors", "LICENSE", "figures/one.png"]
    run(collect(untested, "me/mine"), "me/mine")
    ((_, lines),) = hub.commits
    assert sorted(one["value"]["path"] for one in lines if one["key"] == "deletedFile") == sorted(stale)


@pytest.mark.parametrize("answers", [False, True])
def test_what_a_launched_server_was_given_stays_here_also_in_the_report(tested, answers):
    engine = {"kind": "vllm", "launch": True, "environment": {"KEY": KEY}, "arguments": ["--api-key", KEY]}
    with_override(tested, f"rollouts.engine={json.dumps(engine)}")
    assert KEY in (tested / "config.yaml").read_text()
    found = contents(collect(tested, "me/mine", answers=answers))
    assert any(name.endswith("report.html") for name in found)
    assert not any(KEY.encode() in one for one in found.values())


def test_examples_with_their_answers_go_up_only_where_answers_are_asked_for(tested):
    with_override(tested, f'data.examples=[{{question: "Who is it?", answer: "{SECRET}"}}]')
    with pytest.raises(UserError, match=r"data\.examples: prompts show 1 question.*--answers"):
        collect(tested, "me/mine")
    found = contents(collect(tested, "me/mine", answers=True))
    assert SECRET.encode() in found["calibtrain/config.yaml"]


def with_override(out, override):
    dump_config(load_config(out / "config.yaml", [override]), out / "config.yaml")


@pytest.mark.parametrize(
    ("status", "told"),
    [(401, "hf auth login"), (403, "may not write there"), (404, "no such repository"), (418, "status 418: no")],
)
def test_a_refusal_is_one_clear_line(untested, hub, status, told):
    hub.refuses = status
    with pytest.raises(UserError, match=told) as caught:
        run(collect(untested, "me/mine"), "me/mine")
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_what_is_to_be_private_does_not_go_into_a_public_repository(untested, hub):
    hub.private = False
    with pytest.raises(UserError, match="is there already and public"):
        run(collect(untested, "me/mine"), "me/mine", private=True)
    assert hub.commits == []
    assert hub.stored == {}


def test_no_hub_and_no_name_are_told(untested, hub, monkeypatch):
    import huggingface_hub

    push = collect(untested, "me/mine")
    with pytest.raises(UserError, match="REPO: "):
        run(push, "me/mine/too/long")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        run(push, "me/mine")


def test_a_dry_run_lists_prints_and_sends_nothing(untested, hub):
    done = CliRunner().invoke(app, ["push", str(untested), "me/mine", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "model.safetensors" in done.output
    assert "## Certified" in done.output
    assert hub.asked == []
