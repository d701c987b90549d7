"""Rewards in the loop: models, judges and functions that are asked about a round's replies, and what is told of them."""

from __future__ import annotations

import http.server
import json
import math
import threading
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from calibtrain.errors import EngineFailure, UserError
from calibtrain.training.reward_memory import WATCHED
from calibtrain.training.reward_sources import check_sources
from tests.unit.models.test_reward_scorer import expected, write
from tests.unit.training.test_reward_sources import IDS, STATED, paid, run
from tests.unit.training.test_rollouts import QUESTIONS, batch_of, config, rollouts_of


def by_length(questions, replies, records):
    assert all(one["question"] == question for one, question in zip(records, questions, strict=True))
    return [None if not text else float(len(text)) for text in replies]


def fails(questions, replies, records):
    raise RuntimeError("no\nway")


def too_few(questions, replies, records):
    return [1.0]


def endless(questions, replies, records):
    return [math.inf] * len(replies)


HERE = "tests.unit.training.test_rewards_in_rounds"
FORMAT = {"kind": "format", "pattern": "[aeiou]", "weight": 0.5}


def test_a_reward_model_judges_rollouts_on_questions_without_answers(tmp_path):
    """The whole reply is scored as text, by another tokenizer's template; the round's numbers say what it gave."""
    path = write(tmp_path)
    bare = [replace(one, accepted=()) for one in QUESTIONS]
    rollouts, _ = rollouts_of(
        run({"kind": "model", "path": str(path)}, FORMAT, {"kind": "function", "function": f"{HERE}:by_length"}),
        questions=bare,
    )
    rollouts.before_step(0)
    tokenizer = rollouts.rewards.sources[0].text.tokenizer
    template = rollouts.answerer.template
    said = [template.decode_answer(one.tokens) for one in rollouts.samples]
    turns = [
        [{"role": "user", "content": bare[one.question].question}, {"role": "assistant", "content": text}]
        for one, text in zip(rollouts.samples, said, strict=True)
    ]
    wanted = expected(path, [tokenizer.apply_chat_template(one, tokenize=False) for one in turns])
    assert [one.rewards[0] for one in rollouts.samples] == pytest.approx(wanted, abs=2e-5)
    assert [one.rewards[1] for one in rollouts.samples] == [float(any(c in "aeiou" for c in one)) for one in said]
    assert [one.rewards[2] for one in rollouts.samples if one.rewards[2] == one.rewards[2]] == [
        len(one) for one in said if one
    ]
    assert all(math.isnan(one.correct) for one in rollouts.samples)
    assert rollouts.metrics["source_model"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)
    assert "source_model_auroc" not in rollouts.metrics
    assert batch_of(rollouts).advantages.abs().sum() > 0


def test_a_stated_confidence_is_taken_out_where_it_has_a_score_of_its_own(tmp_path):
    model = {"kind": "model", "path": str(write(tmp_path))}
    for rollouts, answer in (
        ({"reward": "ppo_c", **STATED}, "Paris"),
        ({"confidence": "stated"}, "Paris (confidence: 80%)"),  # PPO-M's reward model reads it
    ):
        made, _ = rollouts_of(run(model, **rollouts))
        assert made.rewards.reply(QUESTIONS[0], "Paris (confidence: 80%)").answer == answer


@pytest.mark.parametrize("steps_per_round", [1, 3])
def test_memory_survives_a_checkpoint_bit_for_bit(tmp_path, steps_per_round):
    stated = {"reward": "ppo_c", **STATED, "steps_per_round": steps_per_round}
    settings = run(
        {"kind": "model", "path": str(write(tmp_path)), "clip": 2.0}, {"kind": "grade", "normalize": True}, **stated
    )
    (whole, _), (other, _) = rollouts_of(settings), rollouts_of(settings)
    for step in range(2):
        whole.before_step(step)
    kept = json.loads(json.dumps(whole.state_dict()))
    other.load_state_dict(kept)
    if steps_per_round > 1:
        assert batch_of(other).advantages.equal(batch_of(whole).advantages)
        assert other.metrics == whole.metrics
    for step in range(2, 4):
        whole.before_step(step)
        other.before_step(step)
        assert batch_of(other).advantages.equal(batch_of(whole).advantages)
    assert other.state_dict() == whole.state_dict()
    assert whole.rewards.memory.moments[0].count > 0  # so that a fresh one would not give the same


def test_a_round_that_did_not_come_about_is_not_remembered(tmp_path, monkeypatch):
    """A server that is lost as a round begins: the checkpoint that is kept then goes on as if it had not been."""
    settings = run({"kind": "model", "path": str(write(tmp_path))}, steps_per_round=2)
    (whole, _), (lost, _), (again, _) = (rollouts_of(settings) for _ in range(3))
    for step in range(2):
        whole.before_step(step)
        lost.before_step(step)

    def away(*_):
        raise EngineFailure("no server")

    monkeypatch.setattr(lost.sampling.engine, "sample", away)
    with pytest.raises(EngineFailure):
        lost.before_step(2)
    again.load_state_dict(json.loads(json.dumps(lost.state_dict())))
    for one in (whole, again):
        one.before_step(2)
    assert again.rewards.memory == whole.rewards.memory
    assert again.rewards.memory.moments[0].count == len(whole.samples)
    assert again.state_dict() == whole.state_dict()


def test_scores_that_nobody_could_grade_are_refused():
    bare = [replace(one, accepted=()) for one in QUESTIONS]
    settings = run({"kind": "function", "function": f"{HERE}:by_length"})
    rollouts_of(settings, questions=bare)
    scored = {"penalties": [{"name": "answer_score", "moves": "all"}]}
    head = {"confidence_head": {}, "data": {"max_length": 64, "splits": {"calibration": 0}}}
    for name, section in (("penalties.answer_score", scored), ("confidence_head", head)):
        more = config("rloo", rollouts=settings.rollouts.model_dump(), **section)
        with pytest.raises(UserError, match=f"{name}: learns from graded answers"):
            rollouts_of(more, questions=bare)
        rollouts_of(more, questions=[*bare, QUESTIONS[0]])
    config_of_solved = {**head, "data": {"max_length": 64, "splits": {"calibration": 64}}}
    rollouts_of(config("rloo", rollouts=settings.rollouts.model_dump(), **config_of_solved), questions=bare)


def test_what_goes_wrong_over_rounds_is_told_once(caplog):
    """A proxy that rises while right answers fall; and a PPO-C whose weight is more than rewards differ by."""
    rollouts, _ = rollouts_of(run({"kind": "function", "function": f"{HERE}:by_length"}))
    for i in range(WATCHED[0] + 4):
        grades = [1] * (4 - i // 3) + [0] * (i // 3)
        rollouts.rewards.begin()
        found = rollouts.rewards.end(paid(*[(float(i),)] * 4, correct=grades[:4]), IDS)
        assert found["proxy"] == i
    assert caplog.text.count("learns to please what rewards it") == 1
    stated = {"reward": "ppo_c", **STATED}
    rollouts, _ = rollouts_of(run({"kind": "function", "function": f"{HERE}:by_length"}, **stated))
    for _ in range(2):
        found = rollouts.rewards.end(paid((0.1,), (0.2,), (0.3,), (0.4,)), IDS)
    assert found["ppo_c_gap"] == pytest.approx(0.2)
    assert found["ppo_c_above"] == 0.5
    assert caplog.text.count("rollouts.ppo_c.weight: 0.5, but rewards above the threshold are only 0.2 more") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "fails raises RuntimeError (no way)"),
        ("too_few", "too_few returns 1 values for 8 replies"),
        ("endless", "endless returns inf at r"),
    ],
)
def test_a_function_that_fails_is_told_in_one_line(name, message):
    rollouts, _ = rollouts_of(run({"kind": "function", "function": f"{HERE}:{name}"}))
    with pytest.raises(EngineFailure) as caught:  # so that a run keeps what it has learnt
        rollouts.before_step(0)
    assert message in str(caught.value)
    assert str(caught.value).startswith("rollouts.sources.0.function")
    assert "\n" not in str(caught.value)


def test_scores_that_are_no_numbers_end_the_round(tmp_path):
    path = write(tmp_path)
    weights = load_file(path / "model.safetensors")
    weights["score.weight"][:] = math.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    rollouts, _ = rollouts_of(run({"kind": "model", "path": str(path)}))
    with pytest.raises(UserError, match=r"rollouts\.sources\.0\.path: 8 of 8 scores are not finite numbers"):
        rollouts.before_step(0)


def test_sources_that_cannot_be_asked_are_told_before_anything_is_loaded(tmp_path):
    for one, message in (
        ({"kind": "function", "function": f"{HERE}:missing"}, "has no function 'missing'"),
        ({"kind": "model", "path": str(tmp_path / "none")}, r"rollouts\.sources\.0\.path: no such directory"),
        (
            {"kind": "judge", "judge": {"url": "nowhere", "model": "j"}},
            r"rollouts\.sources\.0\.judge\.url: 'nowhere' is no address",
        ),
    ):
        with pytest.raises(UserError, match=message):
            check_sources(run(one), QUESTIONS)
    with pytest.raises(UserError, match=r"rollouts\.reward_model: no such directory"):
        check_sources(config("rloo", rollouts={"reward_model": str(tmp_path / "none")}), QUESTIONS)


class JudgeHandler(http.server.BaseHTTPRequestHandler):
    """Calls an answer right that holds an a."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        answer = asked.partition("<answer")[2].partition(">")[2].partition("</answer")[0]
        reply = {"choices": [{"message": {"content": "right" if "a" in answer else "wrong"}, "finish_reason": "stop"}]}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def test_a_judge_behind_an_address_rewards_whole_replies(tmp_path, monkeypatch):
    monkeypatch.setenv("CALIBTRAIN_CACHE", str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), JudgeHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        judge = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "j"}
        rollouts, _ = rollouts_of(run({"kind": "judge", "judge": judge}))
        rollouts.before_step(0)
    finally:
        server.shutdown()
        server.server_close()
    said = [rollouts.answerer.template.decode_answer(one.tokens) for one in rollouts.samples]
    assert [one.rewards for one in rollouts.samples] == [(float("a" in text),) for text in said]
