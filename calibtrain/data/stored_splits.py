"""The splits of stored records: those of `split_records`, question for question, found from the index alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibtrain.config_data import SplitSizes
from calibtrain.data.calibration_set import chosen_places
from calibtrain.data.drops import EXAMPLES_KEPT, DropReport
from calibtrain.data.splits import EVALUATION_SPLITS, SHARES, TOO_FEW_EXAMPLES, VALIDATION_SHARE, cannot_fill
from calibtrain.data.stored import CHOSEN, CONVERSATION, GRADABLE, REJECTED, StoredRecords
from calibtrain.errors import UserError
from calibtrain.records import Record


def split_stored(
    records: StoredRecords,
    sizes: SplitSizes,
    drops: DropReport,
    held_out: Sequence[Record] | None = None,
    *,
    undesirable: bool = False,
    examples: int = 0,
) -> dict[str, Sequence[Record]]:
    """As `split_records`, with train left on disk and the other splits read. Errors as there.

    `held_out`: the records of the evaluation splits that are asked for, where they have a source of their own; then the
    splits returned are train, validation and examples.
    """
    evaluates = any(getattr(sizes, name) for name in EVALUATION_SPLITS)
    names = tuple(SHARES) if evaluates and held_out is None else ("train",)
    pools = _pools(records, names)
    ids = np.zeros(0, dtype=np.uint64)
    if held_out is not None:
        ids = np.array([int(record.key, 16) for record in held_out], dtype=np.uint64)
        train = pools["train"]
        pools["train"] = _kept(train, ~np.isin(train.column("key"), ids), "question held out for evaluation", drops)
    evaluated = [pool.column("key") for name, pool in pools.items() if name != "train" and getattr(sizes, name, False)]
    pools["train"] = _not_taught(pools["train"], np.concatenate([ids, *evaluated]), drops)
    learnable = pools["train"].flagged(CHOSEN | REJECTED if undesirable else CHOSEN)
    train = _kept(pools["train"], learnable, "no answer to learn", drops)
    train = _kept(train, _first(train.column("content")), "the same row again", drops)
    shown, train = _cut_examples(train, examples)
    held = train.column("held") < (VALIDATION_SHARE if sizes.validation else 0)
    validation, train = train.where(held), train.where(~held)
    train = _not_taught(train, validation.column("key"), drops, "question held out for validation")
    pools |= {"train": train, "validation": validation}
    if held_out is not None:
        pools = {name: pools[name] for name in ("train", "validation")}
    for name in EVALUATION_SPLITS if held_out is None else ():
        asked = drops if getattr(sizes, name) else DropReport()
        if evaluates and not getattr(sizes, name):
            whole = pools[name]
            _kept(whole, np.zeros(len(whole), dtype=bool), f"of the {name} split, which is not asked for", drops)
        pool = _kept(pools[name], pools[name].flagged(GRADABLE), "no accepted answers to grade by", asked)
        pools[name] = _kept(pool, _first(pool.column("key")), "question asked before", asked)
    splits: dict[str, Sequence[Record]] = {}
    for name, pool in pools.items():
        size = len(pool) if getattr(sizes, name) is None else getattr(sizes, name)
        if len(pool) < size:
            raise UserError(cannot_fill(name, size, len(pool), held_out is not None or not evaluates, drops))
        drops.unused[name] = len(pool) - size
        splits[name] = pool[:size] if name == "train" else list(pool[:size])
    if held_out is None:
        splits["calibration"] = _stratified(pools["calibration"], sizes.calibration, records)
    return {**splits, "examples": shown} if examples else splits


def _pools(records: StoredRecords, names: Sequence[str]) -> dict[str, StoredRecords]:
    """The records of each split, by the very sums of `split_of`."""
    position = records.column("split") * sum(SHARES[name] for name in names)
    left = np.ones(len(records), dtype=bool)
    pools = dict.fromkeys(SHARES, records[:0])
    for name in names[:-1]:
        here = left & (position < SHARES[name])
        pools[name], left = records.where(here), left & ~here
        position = position - SHARES[name]
    return {**pools, names[-1]: records.where(left)}


def _not_taught(
    train: StoredRecords, held_out: np.ndarray, drops: DropReport, reason: str = "question held out for evaluation"
) -> StoredRecords:
    """Without the conversations of which an earlier turn answers a held-out question; only conversations are read."""
    keeps, known = np.ones(len(train), dtype=bool), set(held_out.tolist())
    for place in np.flatnonzero(train.flagged(CONVERSATION)).tolist() if known else ():
        keeps[place] = known.isdisjoint(int(one, 16) for one in train[place].taught)
    return _kept(train, keeps, reason, drops)


def _first(keys: np.ndarray) -> np.ndarray:
    """Which entries have a key that none before them has. (n,) bool."""
    found = np.zeros(len(keys), dtype=bool)
    found[np.unique(keys, return_index=True)[1]] = True
    return found


def _kept(records: StoredRecords, keeps: np.ndarray, reason: str, drops: DropReport) -> StoredRecords:
    left_out = records.where(~keeps)
    for record in left_out[:EXAMPLES_KEPT]:
        drops.drop(reason, record.origin or record.question)
    if len(left_out) > EXAMPLES_KEPT:
        drops.dropped[reason] += len(left_out) - EXAMPLES_KEPT
    return records.where(keeps)


def _cut_examples(train: StoredRecords, count: int) -> tuple[list[Record], StoredRecords]:
    found: dict[str, Record] = {}
    for record in train if count else ():
        if record.chosen is not None and len(record.prompt) == 1:
            found.setdefault(record.key, record)
        if len(found) == count:
            break
    if len(found) < count:
        raise UserError(TOO_FEW_EXAMPLES.format(count, len(found)))
    ids = np.array([int(one, 16) for one in found], dtype=np.uint64)
    return list(found.values()), train.where(~np.isin(train.column("key"), ids))


def _stratified(pool: StoredRecords, size: int, records: StoredRecords) -> list[Record]:
    asking = records.where(_first(records.column("key")))
    drawn = asking.where(asking.flagged(GRADABLE))
    depth = round(len(drawn) * size / len(pool)) if len(pool) else 0
    return [pool[place] for place in chosen_places(pool.likenesses(), size, drawn[:depth].likenesses())]
