"""What is asked of a vLLM server that samples from a policy, and what of its replies is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from calibtrain.engines import Draws, VLLMServer
from calibtrain.errors import Unreachable, UserError
from tests.unit.engines.fake import FakeModel, serve

END, BREAK = 1, 13
DRAWS = Draws([[5, 6], [7, 8, 9]], [100, 200], 3, {END, BREAK}, 4)


class FakeVLLM(FakeModel):
    """Draws `samples_of(prompt, seed)`, and lets its weights be replaced."""

    def __init__(self, samples_of):
        super().__init__(lambda prompt: [])
        self.samples_of, self.version, self.called = samples_of, "default", []
        self.cleared = True

    def reply(self, body):
        if "method" in body or "new_version" in body or not body:
            self.called.append(body)
            self.version = body.get("new_version", self.version)
            return {"success": self.cleared, "results": [None]}
        choices = []
        for i in range(body["n"]):
            self.answer_of = lambda prompt, i=i: self.samples_of(prompt, body.get("seed", 0) + i)
            one = super().reply({"stop_token_ids": [], **body})["choices"][0]
            known = [None, *({str(token): {"logprob": -0.5, "rank": 3}} for token in body["prompt"][1:])]
            choices.append({**one, "index": i, "prompt_logprobs": known if "prompt_logprobs" in body else None})
        usage = {"prompt_tokens": len(body["prompt"])}
        return {"model": self.name, "choices": choices[::-1], "usage": usage}  # in any order


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("calibtrain.engines.address.LONGEST_WAIT", 0.01)
    one = FakeVLLM(lambda prompt, seed: [20 + seed % 100, 30, END])
    inner = one.before

    def before(path):
        if path == "/weight_info":
            return 200, {}, f'{{"weight_version": "{one.version}"}}'.encode()
        return inner(path)

    one.before = before
    with serve(one) as url:
        one.url, one.server = url, VLLMServer(url)
        one.server.connect()
        yield one


def test_the_ith_sample_of_a_prompt_has_its_own_seed_however_they_are_asked_for(fake, monkeypatch):
    expected = [[(20 + i, 30, END) for i in range(3)]] * 2
    for tokens_a_reply, requests in ((1 << 16, 2), (8, 4), (1, 6)):
        monkeypatch.setattr("calibtrain.engines.vllm.TOKENS_A_REPLY", tokens_a_reply)
        fake.requests.clear()
        found = fake.server.sample(DRAWS, "salt")
        assert [[one.tokens for one in group] for group in found] == expected
        assert all(one.finished and one.logprobs == (-0.25,) * 3 for group in found for one in group)
        assert len(fake.requests) == requests
        assert {body["cache_salt"] for body in fake.requests} == {"salt"}
    assert fake.server.sample(replace(DRAWS, prompts=[], seeds=[]), "salt") == []


def test_a_stop_token_that_does_not_end_a_draw_is_gone_on_from(fake):
    fake.samples_of = lambda prompt, seed: [50, BREAK, 51, END][len(prompt) - 2 :]
    draws = replace(DRAWS, prompts=[[5, 6]], seeds=[3], goes_on=lambda ids: ids[-1] == BREAK, max_new_tokens=5)
    first = fake.server.sample(draws, "salt")
    assert [one.tokens for one in first[0]] == [(50, BREAK)] * 3
    whole = fake.server.go_on(draws, first, "salt")
    assert [one.tokens for one in whole[0]] == [(50, BREAK, 51, END)] * 3
    seeds = [body["seed"] for body in fake.requests]
    assert len(set(seeds[1:])) == 3  # of its own for each draw, other than at the start
    (cut,) = fake.server.go_on(replace(draws, max_new_tokens=2), first, "salt")
    assert {(one.tokens, one.finished) for one in cut} == {((50, BREAK), False)}


def test_loaded_weights_have_their_name_and_an_empty_cache(fake):
    fake.server.load(Path("/weights/7"), "run-7")
    reload, reset, name = fake.called
    assert reload == {"method": "reload_weights", "kwargs": {"weights_path": "/weights/7"}}
    assert (reset, name) == ({}, {"new_version": "run-7"})
    assert fake.server.version() == "run-7"
    fake.cleared = False
    with pytest.raises(Unreachable, match="cache could not be cleared; others ask this server as well"):
        fake.server.load(Path("/weights/8"), "run-8")
    assert fake.server.version() == "run-7"  # they have no name before all is done


def test_scores_are_those_of_the_texts_own_tokens(fake):
    assert fake.server.scores([5, 6, 7], "salt") == [-0.5, -0.5]
    assert fake.requests[-1]["prompt_logprobs"] == 0
    for spoilt, words in (
        (None, "returns no prompt_logprobs"),
        ([None, {"6": {"logprob": -0.5}}], "returns no prompt_logprobs"),
        ([None, {"6": {"logprob": -0.5}}, {"9": {"logprob": -0.5}}], "None is no log-prob of a prompt's token"),
        ([None, {"6": {"logprob": 4.0}}, {"7": {"logprob": -0.5}}], r"4\.0 is no log-prob"),
        ([None, {"6": {"logprob": -0.5}}, {"7": {"logprob": True}}], "True is no log-prob"),
    ):
        fake.spoil = lambda reply, body, spoilt=spoilt: {
            **reply,
            "choices": [{**reply["choices"][0], "prompt_logprobs": spoilt}],
        }
        with pytest.raises(UserError, match=words):
            fake.server.scores([5, 6, 7], "salt")


def spoilt(reply, place=1, **changes):
    choices = [dict(one) for one in reply["choices"]]
    choices[place].update(changes)
    return {**reply, "choices": choices}


SPOILED = {
    "has not the 3 choices": lambda r: {**r, "choices": r["choices"][:2]},
    "has not the 3 choices that": lambda r: spoilt(r, index=0),
    "has not the 3 choices.*": lambda r: spoilt(r, index=None),
    "returns no log-probs": lambda r: spoilt(r, logprobs=None),
    "no ids of the tokens": lambda r: spoilt(r, token_ids=None, logprobs={"tokens": ["a"], "token_logprobs": [-1.0]}),
    "without its end token": lambda r: spoilt(r, token_ids=[20, 30, 31], stop_reason=None),
    "ended by 'abort'": lambda r: spoilt(r, finish_reason="abort"),
    "another prompt than was sent": lambda r: spoilt(r, prompt_token_ids=[0, 5, 6]),
}


@pytest.mark.parametrize("words", SPOILED)
def test_a_draw_that_cannot_be_learnt_from_is_refused(fake, words):
    fake.spoil = lambda reply, body: SPOILED[words](reply)
    with pytest.raises(UserError, match=words) as told:
        fake.server.sample(DRAWS, "salt")
    assert not isinstance(told.value, Unreachable)


def test_a_prompt_without_room_is_told_before_it_is_asked(fake):
    fake.requests.clear()
    with pytest.raises(UserError, match=r"a prompt of 510 tokens .* --max-model-len"):
        fake.server.sample(replace(DRAWS, prompts=[[5] * 510, [6]]), "salt")
    assert not fake.requests


def test_the_first_error_ends_all_requests(fake):
    fake.samples_of = lambda prompt, seed: 1 / 0
    with pytest.raises(Unreachable):
        fake.server.sample(replace(DRAWS, prompts=[[5]] * 500, seeds=range(500)), "salt")
    assert len(fake.requests) < 400
