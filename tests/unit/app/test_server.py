"""The server as clients see it: answers, refusals with their reason, streams, and what hostile requests get."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed (pip install 'calibtrain[serve]')")
from fastapi.testclient import TestClient

from calibtrain.abstention.certificate import Certification
from calibtrain.abstention.groups import GroupCertification
from calibtrain.app.limits import Limits, RateLimiter
from calibtrain.app.server import LOOPBACK, create_app
from calibtrain.pipeline.answer import Answerer
from calibtrain.pipeline.promise import UNLIKE
from calibtrain.pipeline.question import Shapes
from calibtrain.pipeline.reply import REFUSAL
from calibtrain.tasks.short_answer import SHORT_ANSWER
from tests.unit.pipeline.conftest import config_of

CHAT = "/v1/chat/completions"
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "what is it"}
SAID = {"role": "assistant", "content": "a cat"}


def body(question="what", **more):
    return {"model": "demo", "messages": [{"role": "user", "content": question}], **more}


@pytest.fixture
def client(answerer):
    with make(answerer) as client:
        yield client


def make(answerer, hosts=None, **limits):
    app = create_app(answerer, name="demo", limits=Limits(requests_per_minute=0) if not limits else Limits(**limits),
                     hosts=hosts)  # fmt: skip
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def test_a_chat_completion_carries_its_confidence(client, answerer):
    found = client.post(CHAT, json=body("what is it")).json()
    assert found["object"] == "chat.completion"
    assert found["choices"][0]["message"] == {"role": "assistant", "content": "echo what is it", "refusal": None}
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    ours, reply = found["calibtrain"], answerer.answer("what is it")
    assert (ours["confidence"], ours["word"], ours["abstained"]) == (reply.probability, reply.word, False)
    assert ours["certificate"] == answerer.default.certificate.as_dict()
    assert next(iter(ours)) == "promise"  # the first thing that is said
    assert ours["promise"].startswith("Certified for questions like the 1,200 graded ones from questions.jsonl")


def test_it_abstains_in_words_and_in_the_reply(client):
    found = client.post(CHAT, json=body("doubt")).json()
    assert found["choices"][0]["message"]["content"] == REFUSAL
    assert found["calibtrain"]["abstained"] is True
    assert found["calibtrain"]["best_guess"] == "echo doubt"
    assert "I answer from" in found["calibtrain"]["reason"]


def test_a_certified_risk_can_be_chosen_and_another_cannot(client, answerer):
    for level in answerer.levels():
        risk = level.certificate.target_risk
        found = client.post(CHAT, json=body(calibtrain={"risk": risk})).json()
        assert found["calibtrain"]["threshold"] == level.threshold
    refused = client.post(CHAT, json=body(calibtrain={"risk": 0.123}))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "calibtrain.risk"


def without_certificate(answerer, **more):
    none = replace(answerer.calibrated, certification=Certification(None, "too few answers"), curve={})
    return Answerer(answerer.loaded, none, **more)


def test_without_a_certificate_every_door_abstains(answerer):
    with make(without_certificate(answerer)) as client:
        found = client.post(CHAT, json=body("what is it")).json()
        assert found["choices"][0]["message"]["content"] == REFUSAL
        assert found["calibtrain"]["promise"] == "No certificate: too few answers."
        assert (found["calibtrain"]["abstained"], found["calibtrain"]["threshold"]) == (True, None)
        streamed = events(client.post(CHAT, json=body("what is it", stream=True)))
        assert "".join(one["choices"][0]["delta"].get("content", "") for one in streamed) == REFUSAL
        assert client.post("/api/answer", json={"question": "what is it"}).json()["abstained"] is True
        page = client.get("/").text
        assert "No certificate: too few answers." in page
        (level,) = json.loads(page.split('id="levels" type="application/json">')[1].split("</script>")[0])
        assert level["threshold"] is None
        # A client cannot allow by itself what the operator did not.
        for own in ({"uncertified": True}, {"risk": 0.99}, {"threshold": 0}):
            assert client.post(CHAT, json=body(calibtrain=own)).status_code == 400
        assert client.post("/api/answer", json={"question": "q", "uncertified": True}).status_code == 400


def test_an_operator_may_allow_uncertified_answers(answerer):
    with make(without_certificate(answerer, uncertified=True)) as client:
        found = client.post(CHAT, json=body("doubt")).json()
    assert found["choices"][0]["message"]["content"] == "echo doubt"
    assert found["calibtrain"]["promise"] == "No certificate: too few answers."
    assert "how often it is wrong is not known" in found["calibtrain"]["limit"]


def test_a_group_that_is_named_is_answered_by_its_own_certificate_or_not_at_all(answerer, client):
    refused = client.post(CHAT, json=body(calibtrain={"group": "left"}))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "calibtrain.group")
    left = replace(answerer.calibrated.certification, exceptions=())
    groups = GroupCertification({"left": left, "right": Certification(None, "too few")}, 0.05, 0.025, "side")
    grouped = Answerer(answerer.loaded, replace(answerer.calibrated, groups=groups))
    with make(grouped) as client:
        said = {
            group: client.post(CHAT, json=body("what", calibtrain={"group": group})).json()
            for group in ("left", "right", "</script>")
        }
        page = client.get("/").text
    texts = {group: one["choices"][0]["message"]["content"] for group, one in said.items()}
    assert texts == {"left": "echo what", "right": REFUSAL, "</script>": REFUSAL}
    assert said["left"]["calibtrain"]["group"] == "left"
    assert said["right"]["calibtrain"]["promise"].startswith("No certificate for questions of side right")
    assert '<select id="group">' in page
    assert "right (not answered)" in page


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("question", ["what is it", "doubt"])
def test_a_stream_says_what_the_whole_reply_says(client, question):
    whole = client.post(CHAT, json=body(question)).json()
    response = client.post(
        CHAT, json=body(question, stream=True, stream_options={"include_usage": True}, logprobs=True)
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage = events(response)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["calibtrain"] == whole["calibtrain"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    shown = chunks[-1]["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in shown] == ([] if question == "doubt" else [" echo", " what is it"])


def test_a_withheld_guess_is_not_streamed(client):
    *_, last = chunks = events(client.post(CHAT, json=body("doubt", stream=True)))
    assert all("echo" not in chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert last["calibtrain"]["abstained"]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"temperature": 0.7}, "temperature", "greedy"),
        ({"n": 2}, "n", "one answer"),
        ({"top_logprobs": 3}, "top_logprobs", "only the tokens"),
        ({"max_tokens": 1}, "max_tokens", "cut shorter"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"stop": ["."]}, "stop", "not supported; send null"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", '{"type": "text"}'),
        ({"store": True}, "store", "send false"),
        ({"best_of": True}, "best_of", "send 1"),
        ({"temprature": 0}, "temprature", "not a parameter"),
        ({"calibtrain": {"risk": 2}}, "calibtrain.risk", "less than 1"),
        ({"calibtrain": {"rsk": 0.1}}, "calibtrain.rsk", "not a parameter"),
        ({"messages": []}, "messages", "the last message must be a user's"),
        ({"messages": [SYSTEM, USER]}, "messages", "Nothing is certified under this system prompt"),
        ({"messages": [USER, SAID, USER]}, "messages", "Nothing is certified for a conversation"),
        ({"messages": [USER, SAID]}, "messages", "the last message must be a user's"),
        ({"messages": [USER, USER]}, "messages", "follow each other"),
        ({"messages": [{"role": "tool", "content": "x"}, USER]}, "messages", "role 'tool' is not understood"),
        ({"messages": [USER] * 300}, "messages", "at most 256"),
        ({"calibtrain": {"options": ["a", "b"]}}, "calibtrain.options", "chooses from none"),
        ({"calibtrain": {"options": ["a", "a"]}}, "messages", "given twice"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "'text'"),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages", "empty"),
        ({"messages": [{"role": "user", "content": "a <|im_end|> b"}]}, "messages", "control token"),
        ({"messages": [{"role": "user", "content": "w " * 600}]}, "messages", "600 tokens; the limit is 512"),
        ({"messages": "what"}, "messages", "array"),
    ],
)
def test_what_the_certificate_does_not_cover_is_refused_by_name(client, change, param, words):
    response = client.post(CHAT, json=body() | change)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert param is None or error["param"] == param


NEUTRAL = [
    *({name: None} for name in ("stop", "tools", "logit_bias", "response_format", "stream_options", "seed", "calibtrain",
                                "max_tokens", "a_parameter_of_tomorrow")),
    *({name: []} for name in ("stop", "tools", "functions")),
    {"logit_bias": {}}, {"logit_bias": {"7": 0}}, {"metadata": {}}, {"stream_options": {}}, {"stop": ""},
    {"response_format": {"type": "text"}}, {"tool_choice": "none"}, {"parallel_tool_calls": True},
    {"presence_penalty": 0.0, "frequency_penalty": 0}, {"modalities": ["text"]}, {"service_tier": "auto"},
    {"store": False}, {"top_k": -1}, {"repetition_penalty": 1.0}, {"metadata": {"run": 3}, "user": 5}, {"stream": None},
    {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "what is it", "tool_calls": None}]},
]  # fmt: skip


@pytest.mark.parametrize("sent", NEUTRAL, ids=str)
def test_what_clients_send_by_default_changes_nothing(client, sent):
    response = client.post(CHAT, json=body("what is it") | sent)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "echo what is it"


def test_neutral_parameters_and_text_parts_are_taken(client):
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "now"}]
    asked = {"temperature": 0, "n": 1, "top_p": 1.0, "seed": 7, "user": "u", "max_tokens": 999, "logprobs": False}
    found = client.post(CHAT, json=body() | asked | {"messages": [{"role": "user", "content": parts}]})
    assert found.json()["choices"][0]["message"]["content"] == "echo what now"


def test_another_model_is_not_found(client):
    assert client.post(CHAT, json=body() | {"model": "gpt"}).status_code == 404
    assert client.get("/v1/models").json()["data"][0]["id"] == "demo"


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", {}, 400),
        (b"{", {}, 400),
        (b"[" * 60_000, {}, 400),
        (b'{"model": "demo", "model"', {}, 400),
        (b"\xff\xfe\x00", {}, 400),
        (b'{"model": "\\ud800"}', {}, 400),
        (b"null", {}, 400),
        (b"x" * 70_000, {}, 413),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/api/answer"])
def test_hostile_bodies_get_a_reason(client, content, headers, status, path):
    response = client.post(path, content=content, headers={"Content-Type": "application/json"} | headers)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_body_without_a_length_is_stopped_at_the_limit(client):
    sent = []

    def chunks():
        for _ in range(1000):
            sent.append(1)
            yield b"x" * 1024

    assert client.post(CHAT, content=chunks(), headers={"Content-Type": "application/json"}).status_code == 413


def test_other_places_and_methods_are_told(client):
    assert client.get("/nowhere").status_code == 404
    assert client.get(CHAT).status_code == 405
    assert client.get("/nowhere").json()["error"]["code"] == "not_found"
    assert client.get("/static/../server.py").status_code == 404
    assert client.get("/static/%2e%2e/server.py").status_code == 404
    assert client.get("/healthz").json() == {"status": "ok"}


def test_too_many_requests_are_told_when_to_come_back(answerer):
    with make(answerer, requests_per_minute=8) as client:
        assert [client.post("/api/answer", json={"question": "q"}).status_code for _ in range(3)] == [200, 200, 429]
        refused = client.post("/api/answer", json={"question": "q"})
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 8


def test_the_allowance_grows_back_and_is_each_clients_own():
    now = [0.0]
    limiter = RateLimiter(60, clock=lambda: now[0])
    assert [limiter.seconds_to_wait("a") for _ in range(15)] == [0.0] * 15
    assert limiter.seconds_to_wait("a") == pytest.approx(1.0)
    assert limiter.seconds_to_wait("b") == 0
    now[0] = 1.0
    assert limiter.seconds_to_wait("a") == 0
    now[0] = 1e6
    assert [limiter.seconds_to_wait("a") for _ in range(16)][-1] > 0


def test_many_at_once_get_their_own_replies(client, model):
    model.seconds = 0.01
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda i: client.post("/api/answer", json={"question": f"q{i}"}).json(), range(200)))
    assert [one["best_guess"] for one in found] == [f"echo q{i}" for i in range(200)]
    assert 1 < max(model.batches) <= Limits().batch


def test_a_failing_question_is_its_own_fault(client):
    with ThreadPoolExecutor(8) as pool:
        asked = ["broken" if i == 3 else f"q{i}" for i in range(8)]
        found = list(pool.map(lambda question: client.post("/api/answer", json={"question": question}), asked))
    assert [one.status_code for one in found] == [500 if i == 3 else 200 for i in range(8)]
    assert "fault of the model" not in found[3].text


def test_a_full_queue_and_a_slow_model_are_told(answerer, model):
    model.go.clear()
    limits = {"waiting": 1, "batch": 1, "answer_seconds": 0.5, "requests_per_minute": 0}
    with make(answerer, **limits) as client, ThreadPoolExecutor(6) as pool:
        threading.Timer(2.0, model.go.set).start()
        found = list(pool.map(lambda i: client.post("/api/answer", json={"question": f"q{i}"}), range(6)))
        assert {one.status_code for one in found} == {503}
        assert {one.json()["error"]["code"] for one in found} == {"busy", "timeout"}
        assert all(int(one.headers["retry-after"]) >= 1 for one in found)
        model.go.wait()
        later = (client.post("/api/answer", json={"question": "later"}).status_code for _ in range(100))
        assert 200 in later


def test_only_names_of_this_machine_are_served_on_loopback(answerer):
    with make(answerer, hosts=LOOPBACK) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 400


def test_the_page_escapes_names_and_forbids_foreign_script(answerer):
    with TestClient(create_app(answerer, name="<script>alert(1)</script>")) as client:
        page = client.get("/")
    assert "<script>alert" not in page.text
    assert "&lt;script&gt;alert" in page.text
    policy = page.headers["content-security-policy"]
    assert "unsafe-inline" not in policy
    assert "default-src 'none'" in policy
    assert "style=" not in page.text
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "http://" not in page.text
    assert "https://" not in page.text


def shaped(answerer, **shapes):
    return Answerer(answerer.loaded, replace(answerer.calibrated, shapes=Shapes(**shapes)))


def test_a_conversation_is_answered_where_conversations_were_graded(answerer):
    with make(shaped(answerer, conversations=True)) as client:
        found = client.post(CHAT, json=body() | {"messages": [USER, SAID, {**USER, "content": "and why"}]}).json()
        page = client.post("/api/answer", json={"question": "and why", "before": [USER, SAID]}).json()
    assert found["choices"][0]["message"]["content"] == page["best_guess"] == "echo and why"
    assert found["calibtrain"]["certified"]


def test_the_graded_system_prompt_is_taken_and_another_is_not(answerer):
    with make(shaped(answerer, system="Be brief.")) as client:
        for messages in ([SYSTEM, USER], [{**SYSTEM, "role": "developer"}, USER], [USER]):
            assert client.post(CHAT, json=body() | {"messages": messages}).json()["calibtrain"]["certified"]
        refused = client.post(CHAT, json=body() | {"messages": [{**SYSTEM, "content": "Be rude."}, USER]})
        assert "asked under the run's own" in refused.json()["error"]["message"]
        assert "Its system prompt" in client.get("/").text


def test_what_is_not_covered_is_answered_without_a_certificate_where_the_operator_allows(answerer):
    allowed = Answerer(answerer.loaded, answerer.calibrated, uncertified=True)
    with make(allowed) as client:
        talk = client.post(CHAT, json=body() | {"messages": [USER, SAID, USER]}).json()
        plain = client.post(CHAT, json=body("what is it")).json()
    assert talk["choices"][0]["message"]["content"] == "echo what is it"
    assert talk["calibtrain"]["promise"].startswith("Nothing is certified for a conversation")
    assert (talk["calibtrain"]["certified"], talk["calibtrain"]["certificate"]) == (False, None)
    assert plain["calibtrain"]["certified"]


class TellsLong:
    """Tells questions of more than three words to be outside."""

    n = 1000

    def p_values(self, states):
        return np.where(states[:, 0] > 3, 0.001, 0.6)


class WithStates:
    """The echoing model, whose states are the numbers of words."""

    def __init__(self, model, mode):
        self.model, self.template = model, model.template
        self.config = config_of("temperature", target_risk=0.1, outside=mode)

    def measure(self, records):
        states = np.array([[len(record.question.split())] for record in records], dtype=np.float32)
        return replace(self.model.measure(records), states=states)


@pytest.fixture(params=["tell", "abstain"])
def watching(request, model, answerer):
    return Answerer(WithStates(model, request.param), answerer.calibrated, outside=TellsLong())


def test_a_question_unlike_the_graded_ones_is_told_first_at_every_door(watching):
    long = "what is the capital of it"
    tells = watching.loaded.config.abstention.outside == "tell"
    with make(watching) as client:
        near, far = (client.post(CHAT, json=body(one)).json() for one in ("what is it", long))
        *_, streamed = events(client.post(CHAT, json=body(long, stream=True)))
        page = client.post("/api/answer", json={"question": long}).json()
        seen = client.get("/").text
    assert (near["calibtrain"]["outside"], near["calibtrain"]["unlike"]) == (0.6, False)
    assert near["calibtrain"]["certified"]
    ours = far["calibtrain"]
    assert next(iter(ours.items())) == ("promise", UNLIKE)
    assert (ours["outside"], ours["unlike"], ours["certified"], ours["risk"]) == (0.001, True, False, None)
    assert "Certified" not in json.dumps([ours["promise"], ours["limit"], ours["reason"], ours["sentence"]])
    assert far["choices"][0]["message"]["content"] == (f"echo {long}" if tells else REFUSAL)
    assert streamed["calibtrain"] == ours
    assert page["silence"] == UNLIKE
    assert f'"answers_outside": {json.dumps(tells)}' in seen


def test_a_risk_that_is_chosen_does_not_bring_the_certificate_back(watching):
    with make(watching) as client:
        found = client.post(CHAT, json=body("what is the capital of it", calibtrain={"risk": 0.3})).json()["calibtrain"]
    assert (found["certified"], found["promise"]) == (False, UNLIKE)


class Schema(type(SHORT_ANSWER)):
    """Answers that keep to a schema."""

    schema = {"type": "object", "required": ["country"]}  # noqa: RUF012


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ({"type": "json_object"}, True),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": Schema.schema}}, True),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}, False),
        ({"type": "json_schema", "json_schema": "x"}, False),
        ({"type": "grammar"}, False),
    ],
)
def test_a_schema_may_be_asked_for_where_it_is_the_tasks_own(client, model, asked, taken):
    assert client.post(CHAT, json=body(response_format=asked)).status_code == 400
    model.template.task = Schema()
    found = client.post(CHAT, json=body(response_format=asked))
    assert found.status_code == (200 if taken else 400)
    assert taken or found.json()["error"]["param"] == "response_format"


def test_what_a_run_shows_before_every_question_counts_for_none_of_its_tokens(answerer, client):
    """Forty examples are longer than the limit: a run that shows them would refuse whatever it is asked."""
    plain = answerer.loaded.template.prompt_ids
    answerer.loaded.template.prompt_ids = lambda record: ["example"] * 900 + plain(record)
    assert answerer.own_tokens == 900
    assert client.post(CHAT, json=body()).status_code == 200
    long = client.post(CHAT, json=body() | {"messages": [{"role": "user", "content": "w " * 513}]})
    assert "the question has 513 tokens; the limit is 512" in long.json()["error"]["message"]
