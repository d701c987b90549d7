"""What a run learns from, as sequences: encoded once and kept on disk, the same for every rank and every restart."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers
import transformers

import calibtrain.data
from calibtrain.config import RunConfig
from calibtrain.data.drops import DropReport
from calibtrain.data.encode import Encoded, encode_each, tell_departures
from calibtrain.data.lazy import Lazy
from calibtrain.data.stored import StoredRecords, content_of
from calibtrain.data.templates import Template
from calibtrain.data.token_cache import TokenCache, make_cache, open_cache
from calibtrain.data.unpaired import mismatched
from calibtrain.distributed import World, all_agree, gather_lists, on_main, shard, wait_for
from calibtrain.errors import UserError
from calibtrain.models.loading import cache_directory
from calibtrain.models.loss_model import Call, LossModel
from calibtrain.pipeline.prepare import Prepared
from calibtrain.records import Record
from calibtrain.shared_files import sharing
from calibtrain.training.reference import with_reference_logprobs

logger = logging.getLogger(__name__)

ENCODED_ANEW = 2000
"""So many records are encoded by each rank for itself, in a second or two; of more the sequences are kept on disk."""
REFERENCE_BATCH = 16
"""Sequences at once of which the starting model's log-probs are measured."""
KEPT_STEPS = 4
"""Of so many steps the sequences that were read stay in memory."""
SHAPES_NO_TOKEN = {"source", "questions", "splits", "max_dropped", "few_shot_raw", "packing_tokens", "shared_prefix"}
"""Keys of `data` beside the records themselves that encoding does not read."""


def training_examples(
    config: RunConfig, prepared: Prepared, template: Template, model: LossModel, world: World
) -> Sequence[tuple[Encoded, ...]]:
    """The training records as sequences; where a loss asks for it, with the starting model's log-probs.

    Behind each unpaired answer stands its prompt with another's. Empty where the loop makes its own. Call it before a
    checkpoint is loaded. Collective.
    """
    if config.objective.needs.answers_itself:
        return []
    train = prepared.splits["train"]
    encode = partial(_encode, train, config, template)
    tell_departures(train, template)
    if len(train) > ENCODED_ANEW:
        cache = _cached(config, train, template, world)
        if cache is not None:
            prepared.drops.add(cache.drops)
            kept = KEPT_STEPS * config.training.global_batch_size
            return with_reference(config, cache.examples(kept), template, model, world)
    return with_reference(config, list(encode(prepared.drops)), template, model, world)


def _encode(
    train: Sequence[Record], config: RunConfig, template: Template, drops: DropReport
) -> Iterator[tuple[Encoded, ...]]:
    room, unpaired = config.data.max_length, config.trains_unpaired
    every_turn = config.data.every_turn
    found = encode_each(train, template, room, config.trains_on_pairs, drops, unpaired=unpaired, every_turn=every_turn)
    if not unpaired:
        yield from found
        return
    labelled = [one for (one,) in found]
    yield from zip(labelled, mismatched(labelled, room, template.tokenizer.bos_token_id), strict=True)


def _cached(config: RunConfig, train: Sequence[Record], template: Template, world: World) -> TokenCache | None:
    """The sequences on disk, made by one rank of those that share a cache directory. None where it cannot be written.

    The others wait without a clock, and raise what that rank raises. Collective.
    """
    key = on_main(lambda: cache_key(config, train, template))
    folder = cache_directory() / "tokens" / key

    def make() -> None:
        if open_cache(folder) is not None:
            return
        logger.info("encoding %d training records once, to keep them in %s", len(train), folder)
        try:
            make_cache(folder, partial(_encode, train, config, template), config.data.strict)
        except OSError as error:
            logger.warning("the encoded records cannot be kept in %s: %s", folder, error)

    try:
        makers = sorted(set(sharing(folder.parent, world)))
    except UserError as error:
        if isinstance(train, StoredRecords):
            raise
        logger.warning("the encoded records cannot be kept: %s", error)
        return None
    wait_for(makers, make)
    cache = open_cache(folder)
    if all_agree(cache is not None, world.device):
        return cache
    if isinstance(train, StoredRecords):
        raise UserError(
            f"data.source.streaming: the encoded records cannot be kept in {folder.parent} on every machine; set "
            "CALIBTRAIN_CACHE to a directory with room"
        )
    return None


def cache_key(config: RunConfig, train: Sequence[Record], template: Template) -> str:
    """Hash of all that the sequences come from: what the records say, in order, tokenizer, template, task and code."""
    data = {name: value for name, value in config.data.model_dump(mode="json").items() if name not in SHAPES_NO_TOKEN}
    task = [config.task.model_dump(mode="json"), template.task.identity(), template.task.code()]
    facts = [
        data,
        task,
        [config.evaluation.max_new_tokens, config.evaluation.stop],
        [config.trains_on_pairs, config.trains_unpaired],
        template.hash,
        _tokenizer_hash(template),
        _code_hash(),
        [transformers.__version__, tokenizers.__version__],
        _records_hash(train),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _records_hash(train: Sequence[Record]) -> str:
    """SHA-256 over what the records say, in their order, wherever they are kept."""
    if isinstance(train, StoredRecords):
        content = train.column("content")
    else:
        content = np.array([content_of(one) for one in train], dtype=np.uint64)
    return hashlib.sha256(content.tobytes()).hexdigest()


def _tokenizer_hash(template: Template) -> str:
    """SHA-256 over the files that the tokenizer is kept in."""
    whole = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        template.tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                whole.update(file.name.encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()


def _code_hash() -> str:
    """SHA-256 over the code that encodes: what another version made is not read."""
    folder = Path(next(iter(calibtrain.data.__path__)))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()


def with_reference(
    config: RunConfig, examples: Sequence[tuple[Encoded, ...]], template: Template, model: LossModel, world: World
) -> Sequence[tuple[Encoded, ...]]:
    """The examples with the starting model's log-probs, where a loss asks for them. Collective."""
    if not config.needs_reference_logprobs:
        return examples
    if world.is_main:
        logger.info("measuring the starting model's log-probs of %d examples", len(examples))
    mine = shard(examples, world)
    flat = [one for group in mine for one in group]
    known = with_reference_logprobs(
        model.policy,
        flat,
        template.pad_id,
        batch_size=REFERENCE_BATCH,
        within=lambda call: model(Call(lambda module: call())),
        passes=max(gather_lists([-(-len(flat) // REFERENCE_BATCH)])),
    )
    # Every rank may be dealt any example in some epoch: all get the numbers, and none another rank's sequences.
    own = iter([np.array(one.reference_logprobs, dtype=np.float32) for one in known])
    measured = [np.concatenate([np.zeros(0, np.float32), *(next(own) for _ in group)]) for group in mine]
    counts = np.concatenate(gather_lists([np.array([len(one) for one in measured], dtype=np.int64)]))
    values = np.concatenate(gather_lists([np.concatenate([np.zeros(0, np.float32), *measured])]))
    ends = np.cumsum(counts)

    def read(place: int) -> tuple[Encoded, ...]:
        cuts = np.cumsum([one.completion_length for one in examples[place]])
        parts = np.split(values[ends[place] - counts[place] : ends[place]], cuts[:-1])
        pairs = zip(examples[place], parts, strict=True)
        return tuple(replace(one, reference_logprobs=tuple(part.tolist())) for one, part in pairs)

    return Lazy(len(examples), read, KEPT_STEPS * config.training.global_batch_size)
