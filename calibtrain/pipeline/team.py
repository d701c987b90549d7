"""Several processes that answer for one command: rank 0 runs it, and the others answer their shares when it asks.

Only answering is divided: whatever else a command does, reading, fitting and writing, rank 0 does as if it were alone. The
questions are cut into the very batches that one process would make of them, and the batches are dealt to the ranks. Ranks
wait for each other at rank 0's store, not by a clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from calibtrain.calibration.scores import TokenScores
from calibtrain.config import RunConfig
from calibtrain.distributed import WAIT_SECONDS, World, start_world
from calibtrain.errors import UserError
from calibtrain.records import Record

if TYPE_CHECKING:
    from calibtrain.pipeline.evaluate import Loaded
    from calibtrain.pipeline.measurement import Measurement

FAILED, ENDED, LEFT = (f"calibtrain/team/{word}" for word in ("failed", "ended", "left"))
"""Why one of the others gave up; that rank 0 did; how many of the others know it, or gave up themselves."""
LEAVE_SECONDS = 10.0
"""So long rank 0, which holds the store, lets the others find out that it has failed."""
OnBatch = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Load:
    """Load a model, as rank 0 does."""

    config: RunConfig
    model: Path | None


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer the share of these questions, by the model that was loaded as number `model`."""

    model: int
    records: Sequence[Record]
    shots: Sequence[Record]
    head: Any  # FittedHead, or None
    graded: bool


class Team:
    """This process among those that answer for a command."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store = dist.distributed_c10d._get_default_store()
        self.orders = self.meetings = 0
        self.loaded: list[Loaded] = []

    def load(self, loaded: Loaded, config: RunConfig, model: Path | None) -> None:
        """Let the others load what rank 0 is about to load."""
        if self.world.is_main:
            self._tell(Load(config, model))
        self.loaded.append(loaded)

    def measure(
        self, loaded: Loaded, records: Sequence[Record], shots: Sequence[Record], on_batch: OnBatch
    ) -> Measurement:
        """All ranks' answers to `records`, in their order. On rank 0."""
        self._tell(Answer(self.loaded.index(loaded), list(records), list(shots), loaded.head, loaded.graded))
        parts = self._share(loaded, records, shots, on_batch)
        return merged([part for _, part in parts], [places for places, _ in parts], len(records))

    def work(self) -> None:
        """Do what rank 0 asks for, until it has ended."""
        from calibtrain.pipeline.evaluate import Loaded

        try:
            while (order := self._hear()) is not None:
                if isinstance(order, Load):
                    Loaded(order.config, order.model)
                else:
                    loaded = self.loaded[order.model]
                    loaded.head, loaded.graded = order.head, order.graded
                    self._share(loaded, order.records, order.shots, lambda done: None)
        except MainFailed:  # it tells why
            self.store.add(LEFT, 1)

    def end(self) -> None:
        """Let the others go. On rank 0."""
        self._tell(None)

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank gives up, and rank 0 why. Rank 0 waits until they know, for LEAVE_SECONDS."""
        if not self.world.is_main:
            self.store.set(FAILED, f"{type(error).__name__}\n{error}")
            self.store.add(LEFT, 1)
            return
        self.store.set(ENDED, "")
        deadline = time.monotonic() + LEAVE_SECONDS
        while self.store.add(LEFT, 0) < self.world.size - 1 and time.monotonic() < deadline:
            time.sleep(WAIT_SECONDS)

    def _share(
        self, loaded: Loaded, records: Sequence[Record], shots: Sequence[Record], on_batch: OnBatch
    ) -> list[tuple[list[int], Measurement]]:
        """Answer this rank's share. All ranks' places and answers, on rank 0. Collective."""
        world = self.world
        lengths = [len(loaded.template.prompt_ids(record, shots)) for record in records]
        dealt = deal(lengths, loaded.config.evaluation.batch_size, world.size)
        places = dealt[world.rank]
        # In lockstep every rank makes as many passes: what is too few is asked twice, and not looked at.
        wanted = max(map(len, dealt)) if loaded.lockstep else min(1, len(records))
        filled = [*places, *[places[-1] if places else 0] * (wanted - len(places))]
        part = loaded.measure_alone(
            [records[i] for i in filled], shots, lambda done: on_batch(min(len(records), done * world.size))
        )
        # A grade that is missing here ends the command once rank 0 has written all answers, and no sooner.
        task = loaded.template.task
        missing = None if world.is_main else task.handed()
        self._meet()
        found: list[Any] | None = [None] * world.size if world.is_main else None
        dist.gather_object((places, first(part, len(places)), missing), found)
        for *_, handed in (found or [])[1:]:
            task.take(handed)
        return [(own, one) for own, one, _ in found or []]

    def _tell(self, order: Load | Answer | None) -> None:
        self._look()
        self.store.set(self._order_key(), "told")
        try:
            dist.broadcast_object_list([order], src=0)
        except RuntimeError:
            self._look()  # who has just failed has closed its connection
            raise

    def _hear(self) -> Load | Answer | None:
        key = self._order_key()
        while not self.store.check([key]):
            self._look()
            time.sleep(WAIT_SECONDS)
        order: list[Any] = [None]
        dist.broadcast_object_list(order, src=0)
        return order[0]  # type: ignore[no-any-return]

    def _order_key(self) -> str:
        self.orders += 1
        return f"calibtrain/team/order/{self.orders}"

    def _meet(self) -> None:
        """Wait for every rank, however long it takes. Raises as `_look` where one has given up."""
        self.meetings += 1
        key = f"calibtrain/team/meeting/{self.meetings}"
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.world.size:
            self._look()
            time.sleep(WAIT_SECONDS)

    def _look(self) -> None:
        """Raise MainFailed where rank 0 has given up; on rank 0 what another one gave up for, UserError or RuntimeError."""
        if not self.world.is_main:
            if self.store.check([ENDED]):
                raise MainFailed
        elif self.store.check([FAILED]):
            kind, _, words = self.store.get(FAILED).decode().partition("\n")
            raise UserError(words) if kind == UserError.__name__ else RuntimeError(f"a process failed: {kind}: {words}")


class MainFailed(Exception):
    """Rank 0 has given up."""


_TEAM: list[Team] = []


def current() -> Team | None:
    """The team that this process is of; None alone."""
    return _TEAM[-1] if _TEAM else None


@contextmanager
def joined() -> Iterator[Team]:
    """Within, this process is one of the team that the launcher's environment describes. Collective at the start."""
    team = Team(start_world())
    _TEAM.append(team)
    try:
        yield team
        if team.world.is_main:
            team.end()
    except BaseException as error:
        team.failed(error)
        raise
    finally:
        _TEAM.remove(team)


def deal(lengths: Sequence[int], batch_size: int, ranks: int) -> list[list[int]]:
    """Places of the questions of each rank, by the lengths of their prompts: whole batches, in the order of one process."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [[place for batch in batches[rank::ranks] for place in batch] for rank in range(ranks)]


def first(part: Measurement, count: int) -> Measurement:
    """The first `count` answers."""
    tokens = part.tokens
    if tokens is not None:
        kept = tokens.answer < count
        tokens = TokenScores(tokens.table[kept], tokens.hidden[kept], tokens.answer[kept])
    return replace(
        part,
        answers=part.answers[:count],
        table=part.table[:count],
        tokens=tokens,
        states=None if part.states is None else part.states[:count],
        told=None if part.told is None else part.told[:count],
    )


def merged(parts: Sequence[Measurement], places: Sequence[Sequence[int]], count: int) -> Measurement:
    """`count` answers of several ranks at their `places`."""
    where = [place for one in places for place in one]
    back = np.argsort(where)  # each place is there once
    answers = [answer for part in parts for answer in part.answers]

    def rows(name: str) -> Any:
        found = [getattr(part, name) for part, own in zip(parts, places, strict=True) if own]
        return None if not found or found[0] is None else np.concatenate(found)[back]

    tokens = [part.tokens for part in parts if part.tokens is not None]
    scores = None
    if tokens:
        owner = np.concatenate(
            [np.asarray(own, dtype=np.int64)[one.answer] for one, own in zip(tokens, places, strict=True)]
        )
        order = np.argsort(owner, kind="stable")
        scores = TokenScores(
            np.concatenate([one.table for one in tokens])[order],
            np.concatenate([one.hidden for one in tokens])[order],
            owner[order],
        )
    table = rows("table")
    return replace(
        parts[0],
        answers=[answers[i] for i in back],
        table=parts[0].table[:0] if table is None else table,
        tokens=scores,
        states=rows("states"),
        told=rows("told"),
    )
