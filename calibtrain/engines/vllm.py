"""A vLLM server that samples from a policy in training: draws at temperature 1, and weights replaced while it runs.

vLLM offers the latter to whoever reaches it where VLLM_SERVER_DEV_MODE=1 is set. Seen in 0.32: weights that are reloaded
leave the prefix cache as it is, so that prompts go on from states of the old ones (log-probs off by nats); the cache is
cleared here, and every request is salted with the version besides. A reload that fails ends the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any, TypeVar

from calibtrain.engines.address import Address, shown
from calibtrain.engines.completions import LEAST_LOGPROB, UNALTERED, card_of, choices_of, read_choice
from calibtrain.engines.engine import Completion, Draws
from calibtrain.errors import Unreachable, UserError

S = TypeVar("S")
T = TypeVar("T")

AT_ONCE = 32
"""Requests of a rank under way together, each for all samples of a prompt: vLLM batches them."""
TOKENS_A_REPLY = 1 << 16
"""A reply holds at most so many tokens; more samples of a prompt are asked for in parts."""
REQUEST_SECONDS = 540.0
"""The longest that a request may take: other ranks wait for this one, ten minutes at most."""
FACT_SECONDS = 60.0
ATTEMPTS = 4
"""Of a request, within some seconds: who trains waits longer for a server that is away."""
SEED_BITS = 31
OTHER_SEED = 1_000_003
NEEDS = "vLLM 0.32 or newer does, started with the environment variable VLLM_SERVER_DEV_MODE=1 (docs/engines.md)"
DRAWN: dict[str, Any] = {**UNALTERED, "temperature": 1.0, "logprobs": 0, "ignore_eos": True}
"""What ends an answer is in `stop_token_ids`, and nothing that the model's generation_config.json names besides."""


class VLLMServer:
    """The server behind a base URL. Nothing is asked of it before `connect`.

    Raises Unreachable where it does not answer (yet), UserError where it is no such server or a reply is amiss.
    """

    def __init__(self, url: str, *, option: str = "rollouts.engine.address", timeout: float = REQUEST_SECONDS) -> None:
        self.address = Address(url, timeout=timeout, option=option, attempts=ATTEMPTS)
        self.url = self.address.url
        # What is no part of OpenAI's protocol lies beside it.
        root = self.url.removesuffix("/v1")
        must = "replace its weights: " + NEEDS
        self.root = Address(root, timeout=timeout, option=option, must=must, absent=NEEDS, attempts=ATTEMPTS)
        self.facts = Address(root, timeout=min(timeout, FACT_SECONDS), option=option, absent=NEEDS)
        self.model: str | None = None
        self.max_model_len: int | None = None

    def connect(self) -> None:
        """Learn what the server is."""
        card = card_of(self.facts.get("/v1/models"), self.model, self.url)
        length = card.get("max_model_len")
        self.model = card["id"]
        self.max_model_len = length if isinstance(length, int) and not isinstance(length, bool) else None
        self.version()

    def version(self) -> str:
        """What the server calls its present weights: what `load` called them, or a word of its own after a start."""
        reply = self.facts.get("/weight_info")
        found = reply.get("weight_version") if isinstance(reply, dict) else None
        if not isinstance(found, str):
            raise UserError(f"{self.root.url}/weight_info: does not name a version of the weights; {NEEDS}")
        return found

    def load(self, directory: Path, version: str) -> None:
        """Replace the weights by the safetensors of a directory that the server can read. No request may be under way."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        try:
            self.root.post("/collective_rpc", body)
        except Unreachable as error:
            if self._answers():
                raise UserError(
                    f"{error}: it could not load {directory}, and its engine does not survive that. It must see this "
                    "directory (rollouts.engine.directory) and serve the model that is trained; start it again"
                ) from None
            raise
        reply = self.root.post("/reset_prefix_cache", {})
        if not isinstance(reply, dict) or reply.get("success") is not True:
            raise Unreachable(f"{self.root.url}: the prefix cache could not be cleared; others ask this server as well")
        self.root.post("/update_weight_version", {"new_version": version})

    def _answers(self) -> bool:
        try:
            self.version()
        except UserError:
            return False
        return True

    def sample(self, draws: Draws, salt: str) -> list[list[Completion]]:
        """The completions of each prompt, up to their first stop token; `salt` keeps the caches of versions apart."""
        longest = max((len(one) for one in draws.prompts), default=0)
        if self.max_model_len is not None and longest + draws.max_new_tokens > self.max_model_len:
            raise UserError(
                f"{self.url}: a prompt of {longest} tokens and evaluation.max_new_tokens: {draws.max_new_tokens} are more "
                f"than the server's {self.max_model_len}; serve with a larger --max-model-len"
            )

        def whole(place: int) -> list[Completion]:
            part = max(1, TOKENS_A_REPLY // draws.max_new_tokens)
            found: list[Completion] = []
            while len(found) < draws.samples:  # vLLM draws the i-th sample of a request by seed + i
                count, seed = min(part, draws.samples - len(found)), draws.seeds[place] + len(found)
                found += self._ask(draws.prompts[place], seed, count, draws, draws.max_new_tokens, salt)
            return found

        return each(whole, range(len(draws.prompts)))

    def go_on(self, draws: Draws, groups: Sequence[Sequence[Completion]], salt: str) -> list[list[Completion]]:
        """The same completions, taken up again where one came to a stop token that does not end it.

        What tells that (`goes_on`) is called here, in the caller's thread, alone: a tokenizer is not for several.
        """
        found = [list(group) for group in groups]
        if draws.goes_on is None:
            return found
        open_ones = [(i, j) for i, group in enumerate(found) for j in range(len(group))]
        for turn in range(draws.max_new_tokens):
            open_ones = [(i, j) for i, j in open_ones if found[i][j].finished and draws.goes_on(found[i][j].tokens)]
            if not open_ones:
                break
            more = each(partial(self._more, draws, found, salt, turn), open_ones)
            for (i, j), one in zip(open_ones, more, strict=True):
                found[i][j] = one
        return found

    def _more(
        self, draws: Draws, found: Sequence[Sequence[Completion]], salt: str, turn: int, place: tuple[int, int]
    ) -> Completion:
        made = found[place[0]][place[1]]
        left = draws.max_new_tokens - len(made.tokens)
        if not left:
            return replace(made, finished=False)
        prompt = [*draws.prompts[place[0]], *made.tokens]
        seed = (draws.seeds[place[0]] + place[1] + (turn + 1) * OTHER_SEED) % (1 << SEED_BITS)
        (more,) = self._ask(prompt, seed, 1, draws, left, salt)
        return Completion(
            made.tokens + more.tokens, made.logprobs + more.logprobs, more.finished, made.text + more.text
        )

    def _ask(
        self, prompt: Sequence[int], seed: int, count: int, draws: Draws, max_new_tokens: int, salt: str
    ) -> list[Completion]:
        body = {
            **DRAWN,
            "model": self.model,
            "prompt": list(prompt),
            "n": count,
            "seed": seed,
            "max_tokens": max_new_tokens,
            "stop_token_ids": sorted(draws.stop_ids),
            "cache_salt": salt,
        }
        reply = self.address.post("/completions", body)
        choices = choices_of(reply, count, self.url)
        return [read_choice(reply, one, prompt, draws.stop_ids, max_new_tokens, self.url) for one in choices]

    def scores(self, ids: Sequence[int], salt: str) -> list[float]:
        """Log-probs of a text's own tokens, of all but its first."""
        body = {
            **DRAWN,
            "model": self.model,
            "prompt": list(ids),
            "n": 1,
            "max_tokens": 1,
            "prompt_logprobs": 0,
            "cache_salt": salt,
        }
        reply = self.address.post("/completions", body)
        (choice,) = choices_of(reply, 1, self.url)
        found = choice.get("prompt_logprobs")
        if not isinstance(found, list) or len(found) != len(ids):
            raise UserError(f"{self.url}: the server returns no prompt_logprobs, by which its weights are verified")
        return [_score(one, token, self.url) for one, token in zip(found[1:], ids[1:], strict=True)]


def each(call: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """`call` of every item, AT_ONCE together, in their order; the first error ends it.

    In threads that do not keep the process from ending: a run that is over does not wait for what it asked a server.
    """
    found: dict[int, T] = {}
    errors: list[BaseException] = []
    waiting = iter(enumerate(items))
    lock = Lock()

    def work() -> None:
        while not errors:
            with lock:
                place, item = next(waiting, (-1, None))
            if place < 0:
                return
            try:
                found[place] = call(item)  # type: ignore[arg-type]
            except BaseException as error:
                errors.append(error)

    workers = [Thread(target=work, name="rollout-request", daemon=True) for _ in range(min(AT_ONCE, len(items)))]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    if errors:
        raise errors[0]
    return [found[place] for place in range(len(items))]


def _score(entry: Any, token: int, url: str) -> float:
    """The log-prob of `token` in one place of `prompt_logprobs`: {"17": {"logprob": -0.1, ...}}."""
    own = entry.get(str(token)) if isinstance(entry, dict) else None
    value = own.get("logprob") if isinstance(own, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not LEAST_LOGPROB < value <= 1e-3:
        raise UserError(f"{url}: {shown(str(value), 20)} is no log-prob of a prompt's token (prompt_logprobs)")
    return min(0.0, float(value))
