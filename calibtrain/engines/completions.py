"""A model behind `POST /v1/completions` of an OpenAI-compatible server, as vLLM serves it.

What confidence needs and OpenAI's protocol alone does not promise is asked for and checked in every reply: the ids of the
generated tokens and their log-probs, the end token among them, of a greedy answer to exactly the prompt that was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Lock
from typing import Any

from calibtrain.engines.address import Address, shown
from calibtrain.engines.engine import Completion
from calibtrain.errors import UserError

AT_ONCE = 16
"""Requests under way together."""
TOLD = 8
"""Model ids named in a message."""
GREEDY_SLACK = 1e-3
LEAST_LOGPROB = -1000.0
MAX_TOKEN = 1 << 31
UNALTERED: dict[str, Any] = {
    # Said although they are the defaults: a generation_config.json beside the model sets others.
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "add_special_tokens": False,
}
"""The model's own distribution, and its tokens as ids."""
GREEDY: dict[str, Any] = {**UNALTERED, "n": 1, "temperature": 0.0, "logprobs": 1}


@dataclass(frozen=True, slots=True)
class Sent:
    """One reply: the completion, and who says to have made it."""

    completion: Completion
    model: str
    fingerprint: str
    best: float  # log-prob of the likeliest first token


class CompletionsServer:
    """A model of a server; an Engine. `model`: its id there, which need not be given where the server has one.

    Raises UserError where no such server or model answers, wants a key (environment variable CALIBTRAIN_ENGINE_KEY), or
    does not return what confidence needs.
    """

    def __init__(self, url: str, model: str | None = None, *, timeout: float = 300.0) -> None:
        self.address = Address(url, timeout=timeout)
        self.url = self.address.url
        card = card_of(self.address.get("/models"), model, self.url)
        self.model: str = card["id"]
        length = card.get("max_model_len")
        self.max_model_len = length if isinstance(length, int) and not isinstance(length, bool) else None
        self.answers_as: tuple[str, str] | None = None  # model and fingerprint of its first reply

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        stop_ids: Collection[int],
        max_new_tokens: int,
        goes_on: Callable[[Sequence[int]], bool] | None = None,
        on_done: Callable[[int], None] = lambda prompts_done: None,
    ) -> list[Completion]:
        """Greedy completions, AT_ONCE together. UserError, before any is asked for, for a prompt that is too long."""
        for number, prompt in enumerate(prompts):
            if self.max_model_len is not None and len(prompt) + max_new_tokens > self.max_model_len:
                raise UserError(
                    f"{self.url}: prompt {number} has {len(prompt)} tokens, which with max_new_tokens: {max_new_tokens} is "
                    f"more than the server's {self.max_model_len}; serve with a larger --max-model-len"
                )
        lock = Lock()  # a tokenizer is not for several threads

        def still(tokens: Sequence[int]) -> bool:
            with lock:
                return goes_on is not None and goes_on(tokens)

        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            asked = {
                pool.submit(self._whole, prompt, stop_ids, max_new_tokens, still): place
                for place, prompt in enumerate(prompts)
            }
            found: list[Completion | None] = [None] * len(prompts)
            for done, future in enumerate(as_completed(asked), start=1):
                found[asked[future]] = future.result()
                on_done(done)
        finally:
            pool.shutdown(cancel_futures=True)
        return [one for one in found if one is not None]

    def _whole(
        self,
        prompt: Sequence[int],
        stop_ids: Collection[int],
        max_new_tokens: int,
        still: Callable[[Sequence[int]], bool],
    ) -> Completion:
        """One completion, taken up again where it came to a stop token that does not end it."""
        made = self.ask(prompt, stop_ids, max_new_tokens).completion
        while made.finished and still(made.tokens):
            left = max_new_tokens - len(made.tokens)
            if not left:
                return Completion(made.tokens, made.logprobs, False, made.text)
            more = self.ask([*prompt, *made.tokens], stop_ids, left).completion
            made = Completion(
                made.tokens + more.tokens, made.logprobs + more.logprobs, more.finished, made.text + more.text
            )
        return made

    def ask(
        self, prompt: Sequence[int], stop_ids: Collection[int], max_new_tokens: int, temperature: float = 0.0
    ) -> Sent:
        """One checked reply. UserError too where another model answers than before."""
        body = {
            **GREEDY,
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_new_tokens,
            "stop_token_ids": sorted(stop_ids),
            "temperature": temperature,
        }
        sent = read(
            self.address.post("/completions", body), prompt, stop_ids, max_new_tokens, self.url, not temperature
        )
        if self.answers_as is None:
            self.answers_as = (sent.model, sent.fingerprint)
        if self.answers_as != (sent.model, sent.fingerprint):
            before, now = (" ".join(map(shown, one)) for one in (self.answers_as, (sent.model, sent.fingerprint)))
            raise UserError(f"{self.url}: another model or server answers now ({now}) than before ({before})")
        return sent


def read(
    reply: Any, prompt: Sequence[int], stop_ids: Collection[int], max_new_tokens: int, url: str, greedy: bool = True
) -> Sent:
    """The completion in a reply of /v1/completions, whose every part is checked. Raises UserError for what is amiss."""
    (choice,) = choices_of(reply, 1, url)
    completion = read_choice(reply, choice, prompt, stop_ids, max_new_tokens, url)
    best = _best(choice["logprobs"], completion.logprobs, url)
    if greedy and any(top > chosen + GREEDY_SLACK for top, chosen in zip(best, completion.logprobs, strict=True)):
        raise UserError(
            f"{url}: the answer is not greedy (a likelier token was not taken); serve without sampling, penalties or "
            "logit processors of the server's own (vLLM: --generation-config vllm)"
        )
    said = [one if isinstance(one, str) else "" for one in (reply.get("model"), reply.get("system_fingerprint"))]
    return Sent(completion, said[0], said[1], best[0])


def choices_of(reply: Any, count: int, url: str) -> list[dict[str, Any]]:
    """The `count` choices of a reply, in the order of their indices. Raises UserError for any other number."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    found = [one for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
    if len(found) == 1 == count:
        return found
    indices = [one.get("index") for one in found]
    if len(found) != count or set(map(str, indices)) != set(map(str, range(count))):
        wanted = "one choice" if count == 1 else f"the {count} choices that were asked for"
        raise UserError(f"{url}: a reply of /completions has not {wanted}; is this an OpenAI-compatible server?")
    return sorted(found, key=lambda one: int(one["index"]))


def read_choice(
    reply: dict[str, Any],
    choice: dict[str, Any],
    prompt: Sequence[int],
    stop_ids: Collection[int],
    max_new_tokens: int,
    url: str,
) -> Completion:
    """One choice of a reply, whose every part is checked. Raises UserError for what is amiss."""
    _check_prompt(reply, choice, prompt, url)
    scores = choice.get("logprobs")
    scores = scores if isinstance(scores, dict) else {}
    tokens = _tokens(choice, scores, url)
    logprobs = _logprobs(scores, len(tokens), url)
    finished = _finished(choice, tokens, stop_ids, max_new_tokens, url)
    text = choice.get("text")
    return Completion(tokens, logprobs, finished, text if isinstance(text, str) else "")


def card_of(reply: Any, model: str | None, url: str) -> dict[str, Any]:
    """What /v1/models says of the model; UserError where it lists none, several or another one."""
    listed = reply.get("data") if isinstance(reply, dict) else None
    cards = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    cards = [one for one in cards if isinstance(one.get("id"), str) and one["id"]]
    if not cards:
        raise UserError(f"{url}/models: lists no model; is this an OpenAI-compatible server?")
    known = ", ".join(shown(one["id"], 80) for one in cards[:TOLD]) + (", ..." if len(cards) > TOLD else "")
    if model is None and len(cards) > 1:
        raise UserError(f"{url} serves several models; choose one by --engine-model: {known}")
    found = [one for one in cards if model in (None, one["id"])]
    if not found:
        raise UserError(f"--engine-model: {url} serves no {shown(str(model))!r}; it serves: {known}")
    return found[0]


def _check_prompt(reply: dict[str, Any], choice: dict[str, Any], prompt: Sequence[int], url: str) -> None:
    read_ids, usage = choice.get("prompt_token_ids"), reply.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if read_ids is None and count is None:
        raise UserError(f"{url}: the server does not say how many prompt tokens it read (usage.prompt_tokens)")
    if (read_ids is not None and read_ids != list(prompt)) or (count is not None and count != len(prompt)):
        number = len(read_ids) if isinstance(read_ids, list) else count
        raise UserError(
            f"{url}: the server read another prompt than was sent ({len(prompt)} tokens sent, {shown(str(number), 20)} "
            "read); it must neither cut prompts nor add tokens to them"
        )


def _tokens(choice: dict[str, Any], scores: dict[str, Any], url: str) -> tuple[int, ...]:
    """Ids of the generated tokens: `token_ids`, else of older servers "token_id:17" in place of token texts."""
    ids = choice.get("token_ids")
    if ids is None and isinstance(scores.get("tokens"), list):
        named = [str(one).removeprefix("token_id:") for one in scores["tokens"]]
        marked = all(str(one).startswith("token_id:") for one in scores["tokens"])
        ids = [int(one) for one in named] if marked and all(one.isdecimal() for one in named) else None
    if not isinstance(ids, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise UserError(
            f"{url}: the server returns no ids of the tokens it made, so no answer of it can be scored; vLLM does from "
            "0.10.2 on (return_token_ids)"
        )
    if not all(0 <= one < MAX_TOKEN for one in ids):
        raise UserError(f"{url}: a reply holds a token id that is none")
    return tuple(ids)


def _logprobs(scores: dict[str, Any], count: int, url: str) -> tuple[float, ...]:
    values = scores.get("token_logprobs")
    if not isinstance(values, list) or not values:
        raise UserError(
            f"{url}: the server returns no log-probs, which confidence is made of; serve with them (vLLM: --max-logprobs 1)"
        )
    if len(values) != count:
        raise UserError(f"{url}: {count} tokens and {len(values)} log-probs in a reply; each token needs its own")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{url}: a log-prob is {shown(str(value), 20)}, which is no number")
        if not LEAST_LOGPROB < value <= GREEDY_SLACK:
            raise UserError(
                f"{url}: {shown(str(value), 20)} is no log-prob of a token that was chosen; the server must return "
                "natural log-probs (vLLM: --logprobs-mode raw_logprobs)"
            )
    return tuple(min(0.0, float(value)) for value in values)


def _finished(
    choice: dict[str, Any], tokens: Sequence[int], stop_ids: Collection[int], max_new_tokens: int, url: str
) -> bool:
    """Whether the answer ended by itself; UserError where its end token was not returned, or something else cut it."""
    reason = choice.get("finish_reason")
    if len(tokens) > max_new_tokens:
        raise UserError(f"{url}: {len(tokens)} tokens where at most {max_new_tokens} were asked for")
    if reason == "stop":
        # A model's generation_config.json may name end tokens that the template does not know.
        if tokens and (tokens[-1] in stop_ids or choice.get("stop_reason") == tokens[-1]):
            return True
        raise UserError(
            f"{url}: an answer ended without its end token among the tokens, so its log-prob is not known, and the "
            "confidence would be of all answers that begin like it; the server must return it, as vLLM does"
        )
    if reason == "length" and len(tokens) == max_new_tokens:
        return tokens[-1] in stop_ids
    why = (
        f"cut after {len(tokens)} of {max_new_tokens} tokens"
        if reason == "length"
        else f"ended by {shown(str(reason), 40)!r}"
    )
    raise UserError(
        f"{url}: an answer was {why}; the server must not limit answers itself (vLLM: --max-model-len, max_new_tokens in "
        "generation_config.json)"
    )


def _best(scores: dict[str, Any], logprobs: Sequence[float], url: str) -> tuple[float, ...]:
    """Log-prob of the likeliest token in each place."""
    tops = scores.get("top_logprobs")
    if not isinstance(tops, list) or len(tops) != len(logprobs) or not all(isinstance(one, dict) for one in tops):
        raise UserError(
            f"{url}: the server returns no top_logprobs, so whether its answers are greedy cannot be told; serve with them"
        )
    return tuple(
        max([chosen, *(min(0.0, one) for one in top.values() if isinstance(one, int | float))])
        for top, chosen in zip(tops, logprobs, strict=True)
    )
