"""The shapes of OpenAI's chat completions: what of a request is understood, and a Reply as its clients read it.

What the certificate does not cover is refused, not ignored: it holds for answers given greedily, to questions of the shape
that was graded (`pipeline.question.Shapes`). The confidence stands beside the answer in `calibtrain`.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from calibtrain.app.limits import Refusal
from calibtrain.errors import UserError
from calibtrain.pipeline.question import Question, question_of
from calibtrain.pipeline.reply import REFUSAL, Reply
from calibtrain.records import Message

NEUTRAL: dict[str, tuple[Any, str]] = {
    "n": (1, "one answer is given"),
    "temperature": (0, "answers are greedy, as they were when their confidence was calibrated"),
    "top_p": (1, "answers are greedy, as they were when their confidence was calibrated"),
    "top_logprobs": (0, "only the tokens of the answer have log-probs"),
    "presence_penalty": (0, "answers are greedy without penalties"),
    "frequency_penalty": (0, "answers are greedy without penalties"),
}
"""Parameters that are taken at their neutral value alone."""
ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template_kwargs": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": (),
    "ignore_eos": (False,),
    "length_penalty": (1,),
    "logit_bias": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "stop": (),
    "stop_token_ids": (),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "top_k": (-1, 0, 1),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""What clients send by default -> values that ask for nothing, beside null and empty ones; any other is refused."""
MOST = 256
"""Messages or options in one request."""
TOLD_NOTHING = ("seed", "user", "metadata", "safety_identifier", "prompt_cache_key")
"""Parameters that change no answer here, whatever they hold: nothing is drawn and nothing is kept."""


class TextPart(BaseModel):
    """A piece of a message's text."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message; a user's, the last one, is answered."""

    model_config = ConfigDict(extra="forbid")
    role: str
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_keys(cls, values: Any) -> Any:
        """Clients send a message's other keys as null or empty (tool_calls, refusal, audio, ...)."""
        return _without_empty(values, keep=("role", "content"))

    @property
    def text(self) -> str:
        """The whole text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """What else a stream carries."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Choice(BaseModel):
    """Our own part of a request: which certified risk to answer at, the question's group where it is known, its options."""

    model_config = ConfigDict(extra="forbid")
    risk: float | None = Field(default=None, gt=0, lt=1, allow_inf_nan=False)
    group: str | None = None
    options: list[str] = Field(default=[], max_length=MOST)


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="forbid")
    model: str
    messages: list[ChatMessage] = Field(max_length=MOST)
    response_format: dict[str, Any] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    logprobs: bool | None = None
    top_logprobs: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    calibtrain: Choice = Choice()

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_keys(cls, values: Any) -> Any:
        """Drop what asks for nothing: null and empty values, and the neutral ones of ELSEWHERE."""
        if not isinstance(values, dict):
            return values
        values = _without_empty(values, keep=("model", "messages"))
        values = {
            key: value for key, value in values.items()
            if key not in TOLD_NOTHING and not any(_same(value, one) for one in ELSEWHERE.get(key, ()))
        }  # fmt: skip
        bias = values.get("logit_bias")
        if isinstance(bias, dict) and all(_same(value, 0) for value in bias.values()):
            del values["logit_bias"]
        messages = values.get("messages")
        if isinstance(messages, list):  # an empty system prompt says nothing
            values["messages"] = [one for one in messages if not _says_nothing(one)]
        return values

    def question(self) -> Question:
        """What is asked. Raises Refusal for what no model can be asked."""
        return asked_question(self.messages, self.calibtrain.options)


class PageRequest(BaseModel):
    """Body of POST /api/answer, the page's own call."""

    model_config = ConfigDict(extra="forbid")
    question: str
    before: list[ChatMessage] = Field(default=[], max_length=MOST)  # a system prompt, and turns of this conversation
    options: list[str] = Field(default=[], max_length=MOST)

    def asked(self) -> Question:
        """What is asked. Raises Refusal for what no model can be asked."""
        return asked_question([*self.before, ChatMessage(role="user", content=self.question)], self.options)


def asked_question(messages: Sequence[ChatMessage], options: Sequence[str]) -> Question:
    """The question in a request's messages and options. Raises Refusal for what no model can be asked."""
    try:
        return question_of([Message(one.role, one.text) for one in messages], options)
    except UserError as error:
        raise Refusal(400, f"messages: {error}", code="invalid_value", param="messages") from None


def _without_empty(values: Any, keep: Collection[str]) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if key in keep or value not in (None, "", [], {})}


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and not only because True == 1."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _says_nothing(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("system", "developer")
        and message.get("content") in (None, "", [])
    )


def parse(kind: type[BaseModel], body: bytes) -> Any:
    """The request in a JSON body. Raises Refusal that names the key."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # Of a content that may be text or a list of parts, the deepest complaint is about what was meant.
        found = error.errors(include_input=False, include_url=False, include_context=False)
        first = max(found, key=lambda one: len(one["loc"]))
        key = ".".join(str(part) for part in first["loc"] if "[" not in str(part))[:100]
        unknown = first["type"] == "extra_forbidden"
        message = f"{key or 'body'}: {first['msg']}"
        if unknown and key in ELSEWHERE:
            neutral = [json.dumps(value) for value in ELSEWHERE[key]] or ["null"]
            message = f"{key}: not supported; send {' or '.join(neutral)}, or leave it out"
        elif unknown:
            message = f"{key}: not a parameter that is understood here"
        code = (
            "unknown_parameter" if unknown else "invalid_json" if first["type"] == "json_invalid" else "invalid_value"
        )
        raise Refusal(400, message, code=code, param=key or None) from None


def check(request: ChatRequest, model: str, max_new_tokens: int, schema: Any = None) -> None:
    """Raise Refusal for another model, and for parameters that would change how answers are made.

    schema: the task's, where its answers are JSON; no other may be asked for.
    """
    if request.model != model:
        raise Refusal(404, f"model: there is only {model!r} here", code="model_not_found", param="model")
    for name, (neutral, why) in NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and value != neutral:
            raise Refusal(400, f"{name}: {why}; send {neutral} or leave it out", code="unsupported_value", param=name)
    if request.response_format is not None:
        _check_format(request.response_format, schema)
    for name in ("max_tokens", "max_completion_tokens"):
        value = getattr(request, name)
        if value is not None and value < max_new_tokens:
            raise Refusal(
                400,
                f"{name}: answers have up to {max_new_tokens} tokens; cut shorter, their confidence would mean nothing",
                code="unsupported_value",
                param=name,
            )


def _check_format(asked: Mapping[str, Any], schema: Any) -> None:
    """Raise Refusal for a format of replies that is not the task's own."""
    own = schema is not None and asked.get("type") == "json_object"
    if schema is not None and asked.get("type") == "json_schema":
        named = asked.get("json_schema")
        own = isinstance(named, Mapping) and named.get("schema") == schema
    if not own:
        why = "not supported" if schema is None else "answers keep to the schema of the run's task alone"
        message = f'response_format: {why}; send {{"type": "text"}}, or leave it out'
        raise Refusal(400, message, code="unsupported_value", param="response_format")


def confidence_part(reply: Reply) -> dict[str, Any]:
    """What a reply says of itself: the `calibtrain` object, first of all what is certified and of which questions."""
    return {
        "promise": reply.promise,
        "limit": reply.limit,
        "certified": reply.certified,
        "unlike": reply.unlike,
        "outside": reply.outside,
        "group": reply.group,
        "confidence": reply.probability,
        "word": reply.word,
        "sentence": reply.sentence,
        "abstained": reply.abstained,
        "reason": reply.reason,
        "best_guess": reply.text,
        "reply": reply.said,
        "parts": [asdict(part) for part in reply.parts],
        "prediction_set": None if reply.prediction_set is None else list(reply.prediction_set),
        "threshold": reply.threshold,
        "risk": reply.risk,
        "source": reply.source,
        "cost": {"forward_passes": reply.forward_passes, "tokens": reply.tokens_read},
        "certificate": reply.certificate and reply.certificate.as_dict(),
    }


def page_reply(reply: Reply) -> dict[str, Any]:
    """A reply for the page, which decides itself by the slider what to show of it."""
    tokens = [asdict(token) for token in reply.tokens]
    found = {**confidence_part(reply), "sentence": reply.sentence.removesuffix(reply.reservation)}
    own = {
        "question": reply.question,
        "tokens": tokens,
        "refusal": REFUSAL,
        "silence": reply.silence,
    }
    return {**own, **found}


def completion(reply: Reply, request: ChatRequest) -> dict[str, Any]:
    """A chat.completion object."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": reply.spoken, "refusal": None},
        "logprobs": _logprobs(reply) if request.logprobs else None,
        "finish_reason": _finish_reason(reply),
    }
    head = _head("chat.completion", request.model)
    return {**head, "choices": [choice], "usage": _usage(reply), "calibtrain": confidence_part(reply)}


def stream(reply: Reply, request: ChatRequest) -> Iterator[str]:
    """Server-sent events of chat.completion.chunk objects, the last with the confidence.

    Whether to answer is known only once the whole answer is, so nothing is sent before: the pieces of an answer that is
    given come at once after it, and a withheld one never leaves.
    """
    head = _head("chat.completion.chunk", request.model)
    usage = bool(request.stream_options and request.stream_options.include_usage)

    def chunk(delta: dict[str, Any], **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        last = {key: more.pop(key) for key in ("finish_reason", "logprobs") if key in more}
        return _event({**head, "choices": [{**choice, **last}], **({"usage": None} if usage else {}), **more})

    yield chunk({"role": "assistant", "content": ""})
    for piece in _pieces(reply):
        yield chunk({"content": piece})
    logprobs = {"logprobs": _logprobs(reply)} if request.logprobs else {}
    yield chunk({}, finish_reason=_finish_reason(reply), calibtrain=confidence_part(reply), **logprobs)
    if usage:
        yield _event({**head, "choices": [], "usage": _usage(reply)})
    yield "data: [DONE]\n\n"


def _pieces(reply: Reply) -> list[str]:
    """The answer's tokens, joined exactly what is said; in one piece where they are not (a cut line, a refusal)."""
    pieces = [token.text for token in reply.tokens if token.text]
    if pieces:
        pieces[0], pieces[-1] = pieces[0].lstrip(), pieces[-1].rstrip()
    return pieces if "".join(pieces) == reply.spoken else [reply.spoken]


def _finish_reason(reply: Reply) -> str:
    return "stop" if reply.finished or reply.abstained else "length"


def _logprobs(reply: Reply) -> dict[str, Any]:
    shown = [] if reply.abstained else [token for token in reply.tokens if token.text]
    content = [
        {
            "token": token.text,
            "logprob": math.log(token.probability) if token.probability > 0 else -9999.0,
            "bytes": list(token.text.encode()),
            "top_logprobs": [],
        }
        for token in shown
    ]
    return {"content": content, "refusal": None}


def _usage(reply: Reply) -> dict[str, int]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": len(reply.tokens),
        "total_tokens": reply.prompt_tokens + len(reply.tokens),
    }


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
