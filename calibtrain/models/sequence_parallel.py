"""One row's positions on several ranks: DeepSpeed-Ulysses' exchange (arXiv 2309.14509) around transformers' attention.

A group of N ranks has the same micro-batch. Each passes T/N positions of every row through the layers and the head; in each
attention the ranks exchange positions for heads, so that each attends over whole rows with 1/N of the heads, and back. What
a loss reads of a target is a few numbers: they are gathered over the group, with the gradient, and every rank computes the
loss of the whole micro-batch, whatever loss it is. Each position's gradient begins on the one rank that holds it, so the
sum over the group is the gradient of the unsharded pass.

DeepSpeed's own class (UlyssesSPAttentionHF, 0.19) drops every mask, which packed rows and shared prompts need; asserts one
number of rows; and leaves grouped attention changed behind it for the passes that generate. Here it is switched on for
training passes alone, and is the model's own attention in all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from calibtrain.attention_names import told_by_length
from calibtrain.distributed import gather_lists
from calibtrain.errors import UserError
from calibtrain.losses.isolation import quietly
from calibtrain.losses.terms import CHOSEN, Batch
from calibtrain.models.attention_mask import attention_inputs, rule_of_its_own
from calibtrain.models.policy import Policy
from calibtrain.models.sharding import full_shape
from calibtrain.ops import TokenStats

ATTRIBUTE = "_calibtrain_sequence_group"
"""Of an attention module: the SequenceGroup that its training passes are shared by."""
GROWING_ROPE = {"dynamic", "longrope"}
"""Rotary embeddings whose frequencies follow from the largest position that is passed."""
TRIED = (37, 22)
"""Tokens of the rows on which a model is tried."""


@dataclass(slots=True)
class SequenceGroup:
    """The ranks that share this rank's rows, and the micro-batch that they have in hand."""

    rank: int
    size: int
    group: Any  # of torch.distributed
    # Until the next pass: gradient checkpointing runs the layers again in the backward pass.
    active: bool = False
    exchanged: bool = False  # whether its attention has
    mask: Any = None  # of whole rows; None is causal
    lengths: dict[str, Any] = field(default_factory=dict)  # of the rows' sequences, where the attention takes no mask
    positions: Tensor = field(default_factory=lambda: torch.zeros(0))  # (R, T) int64
    places: Tensor = field(default_factory=lambda: torch.zeros(0))  # (n,) int64: this rank's among the N targets
    targets: int = 0  # N

    def part(self, batch: Batch, model: Any) -> tuple[Batch, dict[str, Any]]:
        """This rank's positions of a micro-batch and the targets they predict, and what the backbone is given beside tokens.

        Only rows, positions and targets of the batch that comes back are this rank's. Targets were paired with the states
        that predict them before, so that none is lost where two ranks meet.
        """
        last = batch.input_ids.shape[1] - 1
        batch = _widened(batch, self.size)
        rows, width = batch.input_ids.shape
        own = width // self.size
        here = slice(self.rank * own, (self.rank + 1) * own)
        self.active, self.exchanged, self.targets = True, False, batch.targets.shape[0]
        self.lengths = attention_inputs(batch, model)
        self.mask = self.lengths.pop("attention_mask", None)
        counted = torch.arange(width, device=batch.input_ids.device).expand(rows, width)
        self.positions = self.lengths.pop("position_ids", counted)
        row, column = batch.target_positions // width, batch.target_positions % width
        self.places = (column // own == self.rank).nonzero()[:, 0]
        mine = replace(
            batch,
            input_ids=batch.input_ids[:, here],
            position_ids=self.positions[:, here].clamp(max=max(last, 0)),  # a table of positions may end with the row
            segment_ids=(batch.segment_ids[:, here] > 0).int(),
            branch_ids=None,
            starts=None,
            target_positions=(row * own + column % own)[self.places],
            targets=batch.targets[self.places],
        )
        # A mask that is ready keeps the model from making one of its own rows.
        ready = {} if self.mask is None else {"attention_mask": self.mask}
        return mine, {"position_ids": mine.position_ids, **ready}

    def joined(self, rows: Tensor) -> Tensor:
        """Rows (n, ...) of this rank's targets as those of all (N, ...), in their order; the gradient stays its own."""
        if not self.exchanged:
            raise RuntimeError(
                "the model's attention did not exchange positions for heads: each rank saw its own alone"
            )
        whole: Tensor = _Join.apply(rows, self.places, self.targets, self.group)
        return whole

    def joined_stats(self, stats: TokenStats) -> TokenStats:
        """Statistics of this rank's targets as those of all."""
        numbers = torch.stack([one.to(stats.logprob.dtype) for one in stats], dim=1)
        logprob, entropy, sum_p2, confidence, correct = self.joined(numbers).unbind(1)
        return TokenStats(logprob, entropy, sum_p2, confidence.detach(), correct.detach() > 0.5)

    def attend(self, attention: Callable[..., Any], module: Any, states: Sequence[Tensor], options: Any) -> Any:
        """`attention` over whole rows with this rank's heads. States (R, heads, T/N, D); returns (R, T/N, heads, D)."""
        self.exchanged = True
        query, key, value = states
        if key.shape[1] < self.size:  # several ranks' heads read one head of keys
            key, value = (one.repeat_interleave(self.size // key.shape[1], dim=1) for one in (key, value))
        query, key, value = self._with_few_heads((query, key, value))
        if "position_ids" in options:
            options["position_ids"] = self.positions
        options |= self.lengths
        grouped = getattr(module, "num_key_value_groups", None)
        if grouped is not None:
            module.num_key_value_groups = query.shape[1] // key.shape[1]
        try:
            mixed, _ = attention(module, query, key, value, self.mask, **options)
        finally:
            if grouped is not None:
                module.num_key_value_groups = grouped
        return self._with_few_positions(mixed), None

    def _with_few_heads(self, states: Sequence[Tensor]) -> list[Tensor]:
        """(R, heads, T/N, D) of own positions to (R, heads/N, T, D), in one exchange."""
        rows, _, own, _ = states[0].shape
        parts = [
            one.reshape(rows, self.size, -1, own, one.shape[-1]).permute(1, 0, 3, 2, 4).flatten(3) for one in states
        ]
        got = _Exchange.apply(torch.cat(parts, dim=-1), self.group)  # (N, R, T/N, features)
        whole = got.transpose(0, 1).reshape(rows, self.size * own, -1)
        found = whole.split([one.shape[-1] for one in parts], dim=-1)
        return [
            one.reshape(rows, self.size * own, -1, state.shape[-1]).transpose(1, 2)
            for one, state in zip(found, states, strict=True)
        ]

    def _with_few_positions(self, mixed: Tensor) -> Tensor:
        """(R, T, heads/N, D) to (R, T/N, heads, D)."""
        rows, width, heads, size = mixed.shape
        parts = mixed.reshape(rows, self.size, width // self.size, heads, size).transpose(0, 1)
        got = _Exchange.apply(parts, self.group)  # of each rank its heads at own positions
        return got.permute(1, 2, 0, 3, 4).reshape(rows, width // self.size, self.size * heads, size)


class _Exchange(torch.autograd.Function):
    """The k-th of N parts (N, ...) to rank k, and what each has sent in return. The way back is the same."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        got = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
        dist.all_to_all_single(got, parts.contiguous(), group=group)
        return got

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Exchange.apply(gradient, ctx.group), None


class _Join(torch.autograd.Function):
    """Rows at their places among all ranks'. Each rank computes the same loss, so its own rows' gradient is whole."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, count: int, group: Any) -> Tensor:
        ctx.save_for_backward(places)
        whole = rows.new_zeros((count, *rows.shape[1:])).index_copy_(0, places, rows)
        dist.all_reduce(whole, group=group)  # adds zeros: nothing is rounded
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        return gradient[places], None, None, None


def check_sharing(settings: Any, size: int, longest: int, attention: str = "sdpa") -> None:
    """Raise UserError where `size` ranks cannot share rows of up to `longest` tokens of a model with these settings."""
    if size == 1:
        return
    text = settings.get_text_config()
    where = f"training.sequence_parallel_size: {size}"
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise UserError(f"{where}: {text.model_type} has no attention heads to share; set 1")
    keys = getattr(text, "num_key_value_heads", None) or heads
    if heads % size or (keys % size and size % keys):
        fit = [n for n in range(1, heads + 1) if heads % n == 0 and (keys % n == 0 or n % keys == 0)]
        raise UserError(
            f"{where}: {heads} attention heads and {keys} key-value heads of {text.model_type} do not go round: take one of "
            f"{', '.join(map(str, fit))}"
        )
    within = (
        ("sliding_window",) if told_by_length(attention) else ()
    )  # a window is among what whole rows are attended by
    if rule := rule_of_its_own(text, longest, within):
        raise UserError(f"{where}: {rule}; set 1")
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {str(one.get("rope_type")) for one in (rope, *rope.values()) if isinstance(one, dict)} & GROWING_ROPE
    if kinds:
        raise UserError(f"{where}: {text.model_type} has a rope ({', '.join(kinds)}) by how long a row is; set 1")


def begin_sequence_group(size: int) -> SequenceGroup | None:
    """This rank's group of `size` neighbours; None for one. Collective."""
    if size == 1:
        return None
    rank, found = dist.get_rank(), None
    for first in range(0, dist.get_world_size(), size):
        group = dist.new_group(list(range(first, first + size)))  # every rank makes every group
        if first <= rank < first + size:
            found = group
    return SequenceGroup(rank % size, size, found)


def share_attention(model: Any, shared: SequenceGroup) -> None:
    """Let the model's attention exchange heads for positions while `shared` has a micro-batch in hand.

    What stands in transformers' table of attention implementations asks the module that calls it, so that other models, and
    other passes of this one, are as they were.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.config.get_text_config()._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS[name]
    if not hasattr(attention, ATTRIBUTE):

        def sharing(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any) -> Any:
            own: SequenceGroup | None = getattr(module, ATTRIBUTE, None)
            if own is None or not own.active:
                return attention(module, query, key, value, mask, **options)
            return own.attend(attention, module, (query, key, value), options)

        setattr(sharing, ATTRIBUTE, name)
        AttentionInterface.register(name, sharing)
    for module in model.modules():
        setattr(module, ATTRIBUTE, shared)


def check_in_parts(policy: Policy, shared: SequenceGroup) -> None:
    """Pass a few tokens whole and in parts; what comes out must be the same. Every rank of a run calls it at once.

    It finds attention that does not go through transformers' table, and layers that look at other positions beside it. Of
    weights in parts, call it within the engine's forward (`Call`). Raises UserError.
    """
    batch = _tried(full_shape(policy.causal_model.get_output_embeddings().weight)[0])
    weight = next(policy.parameters())
    batch = batch.to(weight.device)
    name, problem = type(policy.causal_model).__name__, None
    with quietly(policy.modules(), weight.device):
        whole = policy.hidden_at_targets(batch).float()
        try:
            part, given = shared.part(batch, policy.causal_model)
            found = shared.joined(policy.states_at_targets(part, given=given)[0].float())
            distance = ((found - whole).norm() / whole.norm()).item()
            if not distance < (1e-4 if weight.dtype == torch.float32 else 0.05):
                problem = f"its states in parts differ from those of whole rows by {distance:.2g} of their length"
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            problem = str(error).splitlines()[0]
        finally:
            shared.active = False
    told = [one for one in gather_lists([problem]) if one is not None]  # all ranks go on, or none
    if told:
        raise UserError(
            f"training.sequence_parallel_size: {name} cannot be shared by {shared.size} ranks: {told[0]}; set 1"
        )


def _tried(vocabulary: int) -> Batch:
    """Rows of TRIED tokens with a target behind each."""
    width = max(TRIED)
    held = torch.arange(width) < torch.tensor(TRIED)[:, None]
    ids = torch.tensor([[(7 * t + t * t + 3 * r) % vocabulary for t in range(width)] for r in range(len(TRIED))])
    places = held.flatten().nonzero()[:, 0]
    owners = places // width
    count = torch.full((len(TRIED),), CHOSEN)
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(width).expand(len(TRIED), width) * held,
        segment_ids=held.int(),
        target_positions=places,
        targets=ids.flatten()[places],
        sequence_ids=owners,
        is_completion=torch.ones_like(places, dtype=torch.bool),
        roles=count,
        pair_ids=torch.full_like(count, -1),
        correct=torch.full((len(TRIED),), float("nan")),
        record_ids=torch.arange(len(TRIED)),
    )


def _widened(batch: Batch, multiple: int) -> Batch:
    """The batch with rows padded to a multiple of so many tokens."""
    width = batch.input_ids.shape[1]
    more = -width % multiple
    if not more:
        return batch
    rows = {"input_ids", "position_ids", "segment_ids", "branch_ids"}
    wider = {
        one.name: pad(value, (0, more))
        for one in fields(batch)
        if one.name in rows and (value := getattr(batch, one.name)) is not None
    }
    wider |= {
        name: value + value // width * more
        for name, value in (("starts", batch.starts), ("target_positions", batch.target_positions))
        if value is not None
    }
    return replace(batch, **wider)
