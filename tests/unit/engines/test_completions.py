"""The client of a server: what it asks, what it takes, and what it refuses in one line."""

import json
import logging
import socket
import time

import pytest

from calibtrain.engines import CompletionsServer, Identity, identify
from calibtrain.engines.address import KEY_VARIABLE, Address
from calibtrain.engines.completions import AT_ONCE
from calibtrain.errors import UserError
from tests.unit.engines.fake import FakeModel, serve

END, BREAK = 1, 13
STOPS = {END, BREAK}


def model(**changes):
    return FakeModel(lambda prompt: [20 + len(prompt), 30, END], **changes)


@pytest.fixture
def fake():
    one = model()
    with serve(one) as url:
        one.url = url
        yield one


def complete(fake, prompts=((5, 6, 7),), **changes):
    return CompletionsServer(fake.url).complete(prompts, **{"stop_ids": STOPS, "max_new_tokens": 4, **changes})


def choice(reply, **changes):
    reply["choices"][0].update(changes)
    return reply


def scores(reply, **changes):
    reply["choices"][0]["logprobs"].update(changes)
    return reply


def test_completions_come_in_order_with_their_end_token_and_its_logprob(fake):
    prompts = [[9] * n for n in range(1, 41)]
    fake.spoil = lambda reply, body: time.sleep(0.03 * (len(body["prompt"]) % 3)) or reply
    done = []
    found = complete(fake, prompts, on_done=done.append)
    assert [one.tokens for one in found] == [(20 + n, 30, END) for n in range(1, 41)]
    assert all(one.logprobs == (-0.25,) * 3 and one.finished for one in found)
    assert done == list(range(1, 41))
    assert 1 < fake.most_at_once <= AT_ONCE
    assert not complete(fake, [[5]], max_new_tokens=2)[0].finished
    assert complete(fake, []) == []


def test_what_is_asked_is_greedy_whatever_the_servers_defaults(fake):
    complete(fake)
    body = fake.requests[-1]
    asked = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "n": 1}
    assert asked.items() <= body.items()
    assert body["prompt"] == [5, 6, 7]
    assert body["stop_token_ids"] == sorted(STOPS)
    assert body["add_special_tokens"] is False
    assert body["max_tokens"] == 4


def test_a_stop_token_that_does_not_end_the_answer_is_gone_on_from():
    said = [50, BREAK, 51, 52, END]
    one = FakeModel(lambda prompt: said[len(prompt) - 2 :])
    with serve(one) as url:
        one.url = url
        ask = {"prompts": [[5, 6]], "goes_on": lambda ids: ids[-1] == BREAK}
        assert complete(one, **ask, max_new_tokens=8)[0].tokens == tuple(said)
        cut = complete(one, **ask, max_new_tokens=2)[0]
        assert (cut.tokens, cut.finished) == ((50, BREAK), False)
        assert complete(one, [[5, 6]], max_new_tokens=8)[0].tokens == (50, BREAK)


def test_older_servers_that_name_ids_in_place_of_texts_are_read(fake):
    fake.spoil = lambda reply, body: choice(reply, token_ids=None)
    assert complete(fake)[0].tokens == (23, 30, END)


SPOILED = {
    "no log-probs, which confidence is made of": lambda r: choice(r, logprobs=None),
    "3 tokens and 2 log-probs": lambda r: scores(r, token_logprobs=[-0.1, -0.1]),
    "nan, which is no number|NaN is no number": lambda r: scores(r, token_logprobs=[-0.1, float("nan"), -0.1]),
    "None, which is no number": lambda r: scores(r, token_logprobs=[-0.1, None, -0.1]),
    "True, which is no number": lambda r: scores(r, token_logprobs=[-0.1, True, -0.1]),
    "3.5 is no log-prob": lambda r: scores(r, token_logprobs=[3.5, -0.1, -0.1]),
    "-100000.* is no log-prob": lambda r: scores(r, token_logprobs=[-(10**400), -0.1, -0.1]),
    "inf is no log-prob": lambda r: json.dumps(scores(r, token_logprobs=[7, -0.1, -0.1])).replace("7,", "1e999,").encode(),
    "-9999.0 is no log-prob": lambda r: scores(r, token_logprobs=[-9999.0, -0.1, -0.1]),
    "no top_logprobs": lambda r: scores(r, top_logprobs=None),
    "not greedy": lambda r: scores(r, top_logprobs=[{"a": -0.1}, {"b": -0.25}, {"c": -0.25}]),
    "without its end token": lambda r: choice(r, token_ids=[23, 30], stop_reason=None, logprobs={
        "token_logprobs": [-0.1, -0.1], "top_logprobs": [{}, {}]}),
    "ended by 'content_filter'": lambda r: choice(r, finish_reason="content_filter"),
    "cut after 3 of 4 tokens": lambda r: choice(r, finish_reason="length"),
    "no ids of the tokens": lambda r: scores(choice(r, token_ids=None), tokens=["Fran", "ce", ""]),
    "a token id that is none": lambda r: choice(r, token_ids=[-3, 30, END]),
    r"another prompt than was sent \(3 tokens sent, 4 read\)": lambda r: choice(r, prompt_token_ids=[0, 5, 6, 7]),
    r"another prompt than was sent \(3 tokens sent, 2": lambda r: choice(
        {**r, "usage": {"prompt_tokens": 2}}, prompt_token_ids=None),
    "does not say how many prompt tokens": lambda r: choice({**r, "usage": None}, prompt_token_ids=None),
    "not one choice": lambda r: {**r, "choices": []},
    "not one choice|OpenAI": lambda r: ["what"],
    "reply is not JSON": lambda r: b"<html>",
    "larger than 16 MiB": lambda r: b" " * ((1 << 24) + 1),
    r"reply is not JSON \(maximum recursion|reply is not JSON": lambda r: b"[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("words", SPOILED)
def test_a_reply_that_confidence_cannot_rest_on_is_refused(fake, words):
    fake.spoil = lambda reply, body: SPOILED[words](reply)
    with pytest.raises(UserError, match=words) as told:
        complete(fake)
    assert "\n" not in str(told.value)


def test_too_many_tokens_are_refused(fake):
    fake.spoil = lambda reply, body: choice(reply, token_ids=[9] * 9, logprobs={
        "token_logprobs": [-0.1] * 9, "top_logprobs": [{}] * 9})  # fmt: skip
    with pytest.raises(UserError, match="9 tokens where at most 4"):
        complete(fake)


def test_a_prompt_that_is_too_long_is_told_before_anything_is_asked(fake):
    with pytest.raises(UserError, match=r"prompt 1 has 510 tokens.* --max-model-len"):
        complete(fake, [[5], [5] * 510])
    assert not fake.requests


def error(status, message="", **headers):
    return status, headers, json.dumps({"error": {"message": message}}).encode()


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (error(401, "bad key sk-secret"), f"wants a key; put it into the environment variable {KEY_VARIABLE}"),
        (error(404), "not found; give the base URL .* ends in /v1"),
        (
            error(400, "unknown field \x1b[31mstop_token_ids"),
            r"refuses the request \(400: unknown field \[31mstop_token",
        ),
        (error(500, "out of memory"), r"the server failed \(500: out of memory\)"),
        (error(307, Location="http://127.0.0.1:1/v1"), "sends on to another address"),
    ],
)
def test_what_a_server_refuses_is_told_in_one_line(fake, sent, words, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    server = CompletionsServer(fake.url)
    fake.before = lambda path: sent
    with pytest.raises(UserError, match=words) as told:
        server.complete([[5]], stop_ids=STOPS, max_new_tokens=4)
    assert "sk-secret" not in str(told.value)
    assert str(told.value).isprintable()


def test_a_busy_server_is_asked_again_and_not_for_ever(fake, monkeypatch):
    waits = []
    monkeypatch.setattr("calibtrain.engines.address.time.sleep", waits.append)
    server = CompletionsServer(fake.url)
    replies = [error(429, **{"Retry-After": "7"}), error(503, **{"Retry-After": "Wed, 21 Oct"}), None]
    fake.before = lambda path: replies.pop(0)
    assert server.complete([[5]], stop_ids=STOPS, max_new_tokens=4)[0].finished
    assert waits == [7.0, 1.0]
    fake.before = lambda path: error(503, **{"Retry-After": "99999"})
    with pytest.raises(UserError, match=r"stayed too busy \(503\)"):
        server.complete([[5]], stop_ids=STOPS, max_new_tokens=4)
    assert max(waits) == 30.0


def test_the_key_goes_into_the_header_alone(fake, monkeypatch, caplog):
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    with caplog.at_level(logging.DEBUG):
        complete(fake)
    assert fake.headers[-1]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in caplog.text + json.dumps(fake.requests) + repr(vars(CompletionsServer(fake.url)))
    for status, words in ((401, "refuses the key in"), (400, r"your key \*\*\* is")):
        fake.before = lambda path, status=status: error(status, "your key sk-secret is bad")
        with pytest.raises(UserError, match=words) as told:
            complete(fake)
        assert "sk-secret" not in str(told.value)
    monkeypatch.setenv(KEY_VARIABLE, "two\nlines")
    with pytest.raises(UserError, match="printable ASCII"):
        complete(fake)


def test_where_no_server_answers_it_is_told_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    for host in (f"127.0.0.1:{port}", "a..b", "no-such-host.invalid"):
        with pytest.raises(UserError, match="no server answers there"):
            CompletionsServer(f"http://{host}/v1")


def test_a_server_that_hangs_is_given_up(fake):
    server = CompletionsServer(fake.url, timeout=0.3)
    fake.spoil = lambda reply, body: time.sleep(1) or reply
    with pytest.raises(UserError, match=r"no answer within 0.3 s"):
        server.complete([[5]], stop_ids=STOPS, max_new_tokens=4)


@pytest.mark.parametrize(
    "url",
    ["", "here", "ftp://a/v1", "http://", "http://a:99999/v1", "http://me:pw@a/v1", "http://a/v1?key=1", "http://a b"],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UserError, match="--engine: ") as told:
        Address(url)
    assert "pw" not in str(told.value)


def test_the_model_is_the_servers_only_one_or_named(fake):
    fake.models = [{"id": "a"}, {"id": "b\x1b[2J"}]
    with pytest.raises(UserError, match=r"several models; choose one by --engine-model: a, b \[2J"):
        CompletionsServer(fake.url)
    with pytest.raises(UserError, match="serves no 'c'; it serves: a, b"):
        CompletionsServer(fake.url, "c")
    assert CompletionsServer(fake.url, "a").max_model_len is None
    fake.models = []
    with pytest.raises(UserError, match="lists no model"):
        CompletionsServer(fake.url)


def who(fake):
    return identify(CompletionsServer(fake.url), [[5], [5, 6]], STOPS)[0]


def test_another_engine_behind_the_address_is_told_from_the_same(fake):
    first = who(fake)
    assert first.differences(who(fake)) is None
    assert Identity.from_dict(json.loads(json.dumps(first.as_dict()))) == first
    fake.logprob = -0.255  # as rounding may move it
    assert first.differences(who(fake)) is None
    fake.logprob = -0.35
    assert "log-probs of fixed probe prompts moved by up to 0.1 nats" in first.differences(who(fake))
    fake.logprob, fake.fingerprint = -0.25, "fake-2"
    assert "system_fingerprint was fake-1 then and is fake-2 now" in first.differences(who(fake))
    fake.fingerprint, fake.max_model_len = "fake-1", 256
    assert "max_model_len was 512 then and is 256 now" in first.differences(who(fake))
    fake.max_model_len, fake.answer_of = 512, lambda prompt: [77, END]
    assert first.differences(who(fake)) is None  # a tie, as far as the log-probs tell
    fake.logprob = lambda body: -0.2
    assert "moved by up to 0.05 nats" in first.differences(who(fake))


def test_a_model_that_changes_under_way_is_told(fake):
    server = CompletionsServer(fake.url)
    server.ask([5], STOPS, 4)
    fake.fingerprint = "fake-2"
    with pytest.raises(
        UserError, match=r"another model or server answers now \(fake fake-2\) than before \(fake fake-1\)"
    ):
        server.ask([5], STOPS, 4)


def test_logprobs_from_after_the_temperature_are_refused(fake):
    fake.logprob = lambda body: -0.25 if body["temperature"] else 0.0
    with pytest.raises(UserError, match="change with the temperature"):
        who(fake)


@pytest.mark.parametrize("name", ["../../etc", "/srv/model/", "a" * 300, "\x1b[2J", "..", "模型"])
def test_a_folders_name_is_safe_whatever_the_model_is_called(name):
    made = Identity(name, "", "", None, ()).name
    assert made.isascii()
    assert "/" not in made
    assert not made.startswith(".")
    assert len(made) < 64
    assert made != Identity(name + "x", "", "", None, ()).name
