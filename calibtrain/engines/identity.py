"""What can be told of who stands behind an address: its name, its limits, and how it answers a few fixed prompts.

A certificate holds for one engine. Another model, quantisation or arithmetic under the same name shows in the log-probs of
the probes, whatever the server says of itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import takewhile
from typing import Any

from calibtrain.engines.address import shown
from calibtrain.engines.completions import CompletionsServer
from calibtrain.engines.engine import Completion
from calibtrain.errors import UserError

PROBE_TOKENS = 8
TOLERANCE = 0.03
"""Nats by which a probe's log-prob may move and the engine still count as the same."""
TEMPERED = 0.1


@dataclass(frozen=True, slots=True)
class Probe:
    """The greedy answer to one fixed prompt."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """One engine as far as it can be told; the same one gives no `differences`."""

    model: str  # id under which the server lists it
    answers_as: str  # model that its replies name
    fingerprint: str  # system_fingerprint of its replies: vLLM's version and configuration; "" where it has none
    max_model_len: int | None
    probes: tuple[Probe, ...]

    @property
    def hash(self) -> str:
        """SHA-256 over all of it: what stands where a local model has the hash of its weights."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """A folder's name for the model id, which is the server's text: letters, digits and a short hash."""
        last = shown(self.model).rstrip("/").rpartition("/")[2]
        kept = "".join(one if one.isascii() and (one.isalnum() or one in "-_") else "-" for one in last)[:48]
        return f"{kept.strip('-') or 'model'}-{hashlib.sha256(self.model.encode('utf-8', 'replace')).hexdigest()[:8]}"

    def differences(self, other: Identity) -> str | None:
        """How `other` is another engine than this one, in words; None where nothing tells them apart."""
        for label, mine, its in (
            ("model", self.model, other.model),
            ("name in replies", self.answers_as, other.answers_as),
            ("system_fingerprint", self.fingerprint, other.fingerprint),
            ("max_model_len", self.max_model_len, other.max_model_len),
        ):
            if mine != its:
                return f"its {label} was {shown(str(mine), 80)} then and is {shown(str(its), 80)} now"
        if len(self.probes) != len(other.probes):
            return "other probes were sent"
        moved = max((_moved(*both) for both in zip(self.probes, other.probes, strict=True)), default=0.0)
        if moved > TOLERANCE:
            return (
                f"its log-probs of fixed probe prompts moved by up to {moved:.2g} nats (the same engine: {TOLERANCE:g})"
            )
        return None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Identity:
        """Of `as_dict()` values; UserError for others."""
        try:
            probes = tuple(Probe(tuple(one["tokens"]), tuple(one["logprobs"])) for one in values["probes"])
            return cls(**{**{one.name: values[one.name] for one in fields(cls)}, "probes": probes})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"engine: cannot be read ({type(error).__name__}: {error}); calibrate with --engine again"
            ) from None


def identify(
    server: CompletionsServer, prompts: Sequence[Sequence[int]], stop_ids: Collection[int]
) -> tuple[Identity, list[Completion]]:
    """Who answers there, by its greedy answers to `prompts`, one at a time; and these answers.

    Raises UserError where the log-probs are not the model's own: a server may give those after temperature, which at
    temperature 0 are 0 for every token. They are compared with those at temperature 1, where both are the same.
    """
    sent = [server.ask(prompt, stop_ids, PROBE_TOKENS) for prompt in prompts]
    plain = [server.ask(prompt, stop_ids, 1, temperature=1.0) for prompt in prompts]
    for greedy, drawn in zip(sent, plain, strict=True):
        if abs(greedy.best - drawn.best) > TEMPERED:
            raise UserError(
                f"{server.url}: the log-probs change with the temperature, so they are not the model's own; serve those "
                "from before it (vLLM: --logprobs-mode raw_logprobs)"
            )
    made = [one.completion for one in sent]
    identity = Identity(
        model=server.model,
        answers_as=sent[0].model,
        fingerprint=sent[0].fingerprint,
        max_model_len=server.max_model_len,
        probes=tuple(Probe(one.tokens, tuple(round(value, 6) for value in one.logprobs)) for one in made),
    )
    return identity, made


def _moved(before: Probe, now: Probe) -> float:
    """Largest change of a log-prob up to where the answers part: there it is of two tokens, which are near a tie or not."""
    pairs = zip(before.tokens, now.tokens, strict=False)
    same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], pairs))
    compared = zip(before.logprobs[: same + 1], now.logprobs[: same + 1], strict=False)
    return max((abs(mine - its) for mine, its in compared), default=0.0)
