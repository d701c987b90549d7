"""What real vLLM returns is what our own loading finds: the same answers, log-probs and end tokens; then a certificate."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from calibtrain import cli
from calibtrain.config_file import load_config
from calibtrain.engines import CompletionsServer
from calibtrain.engines.address import KEY_VARIABLE
from calibtrain.errors import UserError
from calibtrain.pipeline import engine
from calibtrain.pipeline.answer import load
from calibtrain.pipeline.evaluate import Loaded
from calibtrain.pipeline.served import Served
from calibtrain.records import Message, Record
from tests.end_to_end.runs import finished_run
from tests.serving import needs_vllm, vllm_server
from tests.tiny import write_tiny_model

pytestmark = [pytest.mark.engine, needs_vllm, pytest.mark.timeout(600)]
SIZES = {"train": 8, "calibration": 24, "temperature": 24, "certification": 40, "test": 24}
RECORDS = [Record(prompt=(Message("user", f"What is {i}?"),), accepted=("unknown",)) for i in range(40)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose model ends some of its answers, at EOS or a line break, and is cut in others."""
    output = finished_run(tmp_path_factory.mktemp("served"), SIZES, 12)
    # vLLM's attention on a CPU wants heads of 32; weights this large make a random model's answers differ.
    shape = {"hidden": 128, "tied": False, "seed": 2, "initializer_range": 0.6, "max_position_embeddings": 512}
    write_tiny_model(output / "model", **shape)
    # What a model's authors recommend must not change what is certified.
    defaults = {"eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.3}
    (output / "model" / "generation_config.json").write_text(json.dumps(defaults))
    return output


@pytest.fixture(scope="module")
def url(finished):
    with vllm_server(finished / "model") as address:
        yield address


def test_answers_and_logprobs_are_those_of_our_own_loading(finished, url):
    config = load_config(finished / "config.yaml")
    ours = Loaded(config, finished / "model").measure(RECORDS)
    served = Served(config, finished / "model", url=url)
    theirs = served.measure(RECORDS)
    ended = [one for one in ours.answers if one.finished]
    assert 5 < len(ended) < len(RECORDS)
    for mine, its in zip(ours.answers, theirs.answers, strict=True):
        assert (its.text, its.tokens, its.finished) == (mine.text, mine.tokens, mine.finished)
        np.testing.assert_allclose(its.token_logprobs, mine.token_logprobs, atol=1e-3)
    again = served.measure(RECORDS)  # now from the server's cache
    np.testing.assert_allclose(again.confidence, theirs.confidence, rtol=1e-3)
    assert served.server.max_model_len == 256
    assert served.identity.fingerprint.startswith("vllm-")
    assert served.identity.differences(Served(config, finished / "model", url=url).identity) is None


def test_a_model_with_bos_is_sent_it_once(url):
    """Token ids go as they are, so that nothing is put before them: with a prompt of BOS alone, one token is read."""
    sent = CompletionsServer(url).ask([0], {1}, 1)
    assert len(sent.completion.tokens) == 1  # `ask` refuses another prompt than was sent


def test_what_vllm_refuses_is_told(finished, url):
    with pytest.raises(UserError, match="serves no 'other'; it serves: served"):
        CompletionsServer(url, "other")
    server = CompletionsServer(url)
    with pytest.raises(UserError, match=r"refuses the request \(400: Token id 5000 is out of vocabulary"):
        server.ask([5000], {1}, 1)
    with pytest.raises(UserError, match=r"prompt 0 has 250 tokens"):
        server.complete([[5] * 250], stop_ids={1}, max_new_tokens=12)
    server.max_model_len = None  # not told: its cut is seen in the reply
    with pytest.raises(UserError, match="cut after 6 of 12 tokens"):
        server.complete([[5] * 250], stop_ids=set(), max_new_tokens=12)
    with pytest.raises(UserError, match=r"not found; give the base URL .* ends in /v1"):
        CompletionsServer(url.removesuffix("/v1"))


def test_it_is_certified_and_answers_under_its_certificate(finished, url, monkeypatch):
    grade = "calibtrain.confidence.likelihood.grade"
    monkeypatch.setattr(
        grade, lambda text, accepted, how: len(text) % 8 > 0
    )  # a random model's answers are never right
    command = ["calibrate", str(finished), "--engine", url, "--target-risk", "0.6"]
    done = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    answerer = load(finished, engine=url)
    assert answerer.default.certificate.n == SIZES["certification"]
    done = CliRunner().invoke(cli.app, ["answer", str(finished), "What is 3?", "--engine", url], catch_exceptions=False)
    assert done.output.startswith("Certified for questions like the 40 graded ones")


def test_other_weights_under_the_same_name_are_refused(finished, url, tmp_path, monkeypatch):
    """As the last test of the file: the certificate of the one before is of another model than this one."""
    path = engine.engine_folder(finished, Served(load_config(finished / "config.yaml"), finished / "model", url=url))
    assert (path / "calibration.json").is_file()
    shape = {"hidden": 128, "tied": False, "seed": 3, "initializer_range": 0.6, "max_position_embeddings": 512}
    write_tiny_model(tmp_path, **shape)
    with vllm_server(tmp_path, arguments=("--api-key", "sk-tiny")) as other:
        with pytest.raises(UserError, match=f"wants a key; put it into the environment variable {KEY_VARIABLE}"):
            load(finished, engine=other)
        monkeypatch.setenv(KEY_VARIABLE, "sk-tiny")
        with pytest.raises(UserError, match="another engine than the one that was measured"):
            load(finished, engine=other)
