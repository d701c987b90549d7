"""Rollouts drawn behind an address: whose weights answer, what becomes of failures, and what is drawn ahead."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest
import torch

from calibtrain.config import RunConfig
from calibtrain.engines import Draws
from calibtrain.errors import EngineFailure, UserError
from calibtrain.pipeline.check import check_rollout_engine
from calibtrain.training import preemption
from calibtrain.training.own_sampling import OwnSampling
from calibtrain.training.served_sampling import ServedSampling
from tests.policy_server import PolicyServer
from tests.tiny import write_tiny_model
from tests.unit.training.serving_cases import answerer_of, moved


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("policy"), seed=3, initializer_range=0.3)


@pytest.fixture
def policy(source, monkeypatch):
    monkeypatch.setattr("calibtrain.engines.address.LONGEST_WAIT", 0.02)
    monkeypatch.setattr("calibtrain.training.served_sampling.LOOK_SECONDS", 0.02)
    with PolicyServer(source) as server:
        yield server


def config(source, tmp_path, **engine):
    return RunConfig.model_validate(
        {
            "output_dir": str(tmp_path / "out"),
            "model": {"source": str(source), "dtype": "fp32", **engine.pop("model", {})},
            "data": {"max_length": 64},
            "objective": {"name": "grpo"},
            "rollouts": {"reward": "accuracy", "engine": {"kind": "vllm", **engine}},
        }
    )


@pytest.fixture
def served(policy, source, tmp_path):
    run = config(source, tmp_path, address=policy.url, wait=3)
    answerer, prompts = answerer_of(run)
    made = ServedSampling(run, answerer, prompts, prompts)
    made.prompts = prompts
    made.draws = Draws(prompts, [11, 12, 13, 14], 3, answerer.template.stop_ids, 4)
    yield made
    made.close()


def own_logprobs(answerer, prompt, tokens):
    with torch.no_grad():
        logits = answerer.module.policy.causal_model(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
    return [float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(tokens)]


def test_every_round_is_drawn_by_the_weights_of_its_step(served, policy):
    for step in range(4):
        groups = served.sample(served.draws, step)
        for prompt, group in zip(served.prompts, groups, strict=True):
            assert len(group) == 3
            for one in group:
                assert one.version == step
                assert own_logprobs(served.answerer, prompt, one.tokens) == pytest.approx(one.logprobs, abs=1e-3)
        assert served.metrics["engine_gap"] < 1e-3
        assert served.metrics["staleness"] == 0
        assert policy.version.endswith(f"-{step}")
        moved(served.answerer, 0.05, step)
    assert len(policy.loads) == len(set(policy.loads)) == 4
    assert [one.name for one in served.directory.glob("weights-*")] == policy.loads[-1:]
    again = served.sample(served.draws, 4)
    assert served.sample(served.draws, 4) == again  # by its seeds, and without another push
    assert len(policy.loads) == 5
    assert (served.directory / "start").resolve().name == policy.loads[-1]
    served.close()
    assert list(served.directory.iterdir()) == []


def test_a_draw_is_the_models_own_distribution_whatever_it_recommends(served, policy):
    served.sample(served.draws, 0)
    asked = [body for path, body in policy.requests if body.get("n") == 3]
    assert len(asked) == 4
    neutral = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
    }
    for body in asked:
        assert neutral.items() <= body.items()
        assert body["cache_salt"] == policy.version
    assert sorted(body["seed"] for body in asked) == [11, 12, 13, 14]


@pytest.mark.parametrize("size", [0.05, 1e-4])
def test_stale_weights_are_told_however_little_they_moved(served, policy, size):
    served.push(0)
    moved(served.answerer, size)
    served.push(1)
    policy.stale = True
    moved(served.answerer, size)
    with pytest.raises(EngineFailure, match="its weights are stale"):
        served.push(2)


def test_weights_that_did_not_move_are_not_stale(served):
    for step in range(3):
        served.push(step)


def test_another_model_behind_the_address_is_told(policy, source, tmp_path):
    other = write_tiny_model(tmp_path / "other", seed=4, initializer_range=0.3)
    run = config(other, tmp_path, address=policy.url)
    answerer, prompts = answerer_of(run)
    policy.stale = True
    with pytest.raises(EngineFailure, match=r"the largest difference is .* nats \(at most 0.01"):
        ServedSampling(run, answerer, prompts, prompts).push(0)


def restarted_at(policy, path, count):
    """Let the server be started anew, with its old weights, as the count-th request of a path comes."""
    seen = []

    def before(where):
        if where == path:
            seen.append(where)
            if len(seen) == count:
                policy.before = lambda where: None
                policy.model.load_state_dict({k: v * 0 for k, v in policy.model.state_dict().items()})
                policy.version = "default"
        return

    policy.before = before


def test_a_server_that_was_started_anew_in_a_round_gets_the_weights_again(served, policy, caplog):
    expected = served.sample(served.draws, 0)
    served.sample(replace(served.draws, samples=1), 0)
    restarted_at(policy, "/v1/completions", 2)
    assert served.sample(served.draws, 0) == expected  # none of them from the weights that it was started with
    assert len(policy.loads) == 2
    assert "was started anew, or another run uses it" in caplog.text


def test_a_server_that_is_away_is_waited_for(served, policy, caplog):
    expected = served.sample(served.draws, 0)
    policy.stop()
    threading.Timer(0.5, policy.start).start()
    assert served.sample(served.draws, 0) == expected
    assert "waiting for the server" in caplog.text
    policy.before = lambda path: (503, {}) if path == "/v1/completions" else None
    threading.Timer(0.5, lambda: setattr(policy, "before", lambda path: None)).start()
    assert served.sample(served.draws, 0) == expected


def test_a_server_that_stays_away_is_an_error(served, policy, monkeypatch):
    served.sample(served.draws, 0)
    policy.stop()
    with pytest.raises(EngineFailure, match=r"no server answers there .*waited 3 s \(rollouts.engine.wait\)"):
        served.sample(served.draws, 1)
    monkeypatch.setattr("calibtrain.training.served_sampling.stop_was_asked", lambda: True)
    began = time.monotonic()
    with pytest.raises(EngineFailure, match="asked to stop"):
        served.sample(served.draws, 1)
    assert time.monotonic() - began < 2.5
    policy.start()


def test_replies_that_are_amiss_end_the_round_at_once(served, policy):
    served.push(0)
    policy.completions = lambda body: {"choices": []}
    with pytest.raises(EngineFailure, match="has not the 3 choices that were asked for"):
        served.sample(served.draws, 0)


def test_a_server_that_cannot_read_the_weights_is_told(served, policy):
    policy.before = lambda path: (
        (500, {"error": {"message": "no such directory"}}) if path == "/collective_rpc" else None
    )
    with pytest.raises(EngineFailure, match=r"no such directory.*could not load .*It must see this directory"):
        served.push(0)


def test_a_server_without_the_development_mode_is_told(served, policy):
    policy.before = lambda path: (404, {"detail": "Not Found"}) if path == "/weight_info" else None
    with pytest.raises(EngineFailure, match="VLLM_SERVER_DEV_MODE=1"):
        served.push(0)


def test_a_directory_that_cannot_be_written_is_told(policy, source, tmp_path):
    (tmp_path / "file").write_text("")
    run = config(source, tmp_path, address=policy.url, directory=str(tmp_path / "file"))
    answerer, prompts = answerer_of(run)
    with pytest.raises(EngineFailure, match=r"rollouts.engine.directory: .* cannot be written"):
        ServedSampling(run, answerer, prompts, prompts).push(0)


def test_what_is_drawn_ahead_is_one_step_stale(served, policy):
    served.sample(served.draws, 0)
    following = replace(served.draws, seeds=[21, 22, 23, 24])
    served.start(following)
    expected = served.started()[1]
    moved(served.answerer, 0.05)
    assert served.sample(following, 1) == expected
    assert served.metrics["staleness"] == 1
    assert {one.version for group in expected for one in group} == {0}
    assert len(policy.loads) == 1
    served.start(served.draws)  # of weights that nobody pushed: those of version 0
    fresh = served.sample(following, 1)  # other draws than were started
    assert {one.version for group in fresh for one in group} == {1}


def test_what_is_drawn_ahead_survives_a_checkpoint(served, policy, source, tmp_path):
    served.push(0)
    served.start(served.draws)
    version, groups = json.loads(json.dumps([0, [[one.tokens for one in group] for group in served.started()[1]]]))
    kept = served.started()[1]
    run = config(source, tmp_path, address=policy.url)
    other = ServedSampling(run, served.answerer, served.prompts, served.prompts)
    other.restore(served.draws, version, kept)
    assert other.sample(served.draws, 1) == kept
    assert [[list(one.tokens) for one in group] for group in kept] == groups
    assert other.metrics["staleness"] == 1
    assert len(policy.loads) == 1


def test_what_was_lost_ahead_is_drawn_anew(served, policy):
    served.push(0)
    policy.before = lambda path: (503, {}) if path == "/v1/completions" else None
    served.start(served.draws)
    assert served.started() is None
    policy.before = lambda path: None
    moved(served.answerer, 0.05)
    assert {one.version for group in served.sample(served.draws, 1) for one in group} == {1}


def test_adapters_are_merged_into_what_the_server_gets(policy, source, tmp_path):
    run = config(source, tmp_path, address=policy.url, model={"lora": {"r": 4}})
    answerer, prompts = answerer_of(run)
    served = ServedSampling(run, answerer, prompts, prompts)
    for step in range(2):
        served.push(step)
        with torch.no_grad():
            for name, parameter in answerer.module.named_parameters():
                if "lora_" in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
    served.push(2)
    assert served.metrics["engine_gap"] < 1e-3


def test_our_own_drawing_does_not_depend_on_batches(source, tmp_path):
    run = config(source, tmp_path, address="http://127.0.0.1:9/v1")
    answerer, prompts = answerer_of(run)
    draws = Draws(prompts, [5, 6, 7, 8], 3, answerer.template.stop_ids, 6)
    whole = OwnSampling(answerer).sample(draws, 7)
    alone = OwnSampling(answerer)
    for place, prompt in enumerate(prompts):
        (group,) = alone.sample(replace(draws, prompts=[prompt], seeds=[draws.seeds[place]]), 7)
        assert [one.tokens for one in group] == [one.tokens for one in whole[place]]
        assert all(one.version == 7 for one in group)
        for one in group:
            assert own_logprobs(answerer, prompt, one.tokens) == pytest.approx(one.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({}, "needs either `address`"),
        ({"address": "http://127.0.0.1:1/v1", "launch": True}, "needs either `address`"),
        ({"kind": "own", "overlap": True}, "overlap needs kind: vllm"),
        ({"kind": "own", "address": "http://127.0.0.1:1/v1"}, "address needs kind: vllm"),
    ],
)
def test_settings_that_do_not_fit_are_refused(source, tmp_path, engine, words):
    with pytest.raises(ValueError, match=words):
        config(source, tmp_path, **engine)


def test_the_engine_is_looked_for_before_the_run(policy, source, tmp_path):
    check_rollout_engine(config(source, tmp_path, address=policy.url))
    policy.before = lambda path: (404, {}) if path == "/weight_info" else None
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        check_rollout_engine(config(source, tmp_path, address=policy.url))
    with pytest.raises(UserError, match=r"no server answers there .*vllm serve MODEL.*make engines"):
        check_rollout_engine(config(source, tmp_path, address="http://127.0.0.1:9/v1"))
    with pytest.raises(UserError, match="has no vLLM"):
        check_rollout_engine(config(source, tmp_path, launch=True))


def test_who_was_asked_to_stop_does_not_wait_long_for_draws(served, policy, monkeypatch):
    served.push(0)
    monkeypatch.setattr("calibtrain.training.served_sampling.stop_was_asked", lambda: True)
    monkeypatch.setattr("calibtrain.training.served_sampling.STOP_SECONDS", 0.05)
    policy.before = lambda path: time.sleep(0.4) if path == "/v1/completions" else None
    served.start(served.draws)
    assert served.started() is None
    assert served.sample(served.draws, 1)
    assert served.metrics["staleness"] == 1
    served.start(served.draws)
    time.sleep(1.0)
    assert served.started() is not None


def test_an_interpreter_without_vllm_is_told_how_to_get_it(source, tmp_path):
    run = config(source, tmp_path, launch=True)
    answerer, prompts = answerer_of(run)
    with pytest.raises(UserError, match=r"has no vLLM; install vLLM there \(pip install vllm; .*make engines"):
        ServedSampling(run, answerer, prompts, prompts)
    assert not preemption.stop_was_asked()
