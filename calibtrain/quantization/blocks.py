"""A causal language model seen as blocks, which are quantised one after the other on what the ones before hand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError


@dataclass(frozen=True, slots=True)
class Text:
    """One calibration sample: a prompt and the model's own answer to it."""

    prompt: Sequence[int]
    answer: Sequence[int]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What blocks read, of one batch, padded on the right."""

    hidden: Tensor  # (B, T, H)
    arguments: Sequence[Mapping[str, Any]]  # of each block: masks, positions, rotary embeddings
    real: Tensor  # (B, T) bool: no padding
    predicts: Tensor  # (B, T) bool: positions whose next token is one of the answer

    def with_hidden(self, hidden: Tensor) -> Inputs:
        """The same batch behind another block."""
        return replace(self, hidden=hidden)


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's blocks: "model.layers", "transformer.h". Raises UserError where there is none."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and any(True for _ in module.parameters()):
            return name, module
    raise UserError(f"{type(model).__name__}: has no list of {count} blocks to quantise one after the other")


def is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix: nn.Linear, or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrix_of(module: Any) -> Tensor:
    """A view (out, in) of the weight; Conv1D stores it as (in, out)."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


def matrices_in(block: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The layers of a block that multiply by a matrix, by name (behind `prefix`), in the order of its definition."""
    return {f"{prefix}{name}": module for name, module in block.named_modules() if is_matrix(module)}


def batches_of(texts: Sequence[Text], pad_id: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(input_ids, real, predicts), each (B, T), of texts of like length together, padded on the right."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index].prompt) + len(texts[index].answer))
    for start in range(0, len(order), size):
        rows = [texts[index] for index in order[start : start + size]]
        width = max(len(one.prompt) + len(one.answer) for one in rows)
        ids = torch.full((len(rows), width), pad_id)
        real, predicts = (
            torch.zeros(len(rows), width, dtype=torch.bool),
            torch.zeros(len(rows), width, dtype=torch.bool),
        )
        for row, one in enumerate(rows):
            tokens = [*one.prompt, *one.answer]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            real[row, : len(tokens)] = True
            predicts[row, len(one.prompt) - 1 : len(tokens) - 1] = True
        yield ids, real, predicts


@torch.no_grad()
def first_inputs(model: Any, texts: Sequence[Text], pad_id: int, size: int = 32) -> list[Inputs]:
    """What the first block reads of each batch, and what every block is told beside its hidden states.

    No block runs: they may lie on the meta device. Padding is on the right, behind every token that counts.
    """
    blocks, found = find_blocks(model)[1], []
    device = model.get_input_embeddings().weight.device
    for ids, real, predicts in batches_of(texts, pad_id, size):
        hidden: list[Tensor] = []
        arguments: list[dict[str, Any]] = []
        with _recorded(blocks, hidden, arguments):
            model.base_model(input_ids=ids.to(device), use_cache=False)
        found.append(Inputs(hidden[0], arguments, real.to(device), predicts.to(device)))
    return found


def passed_through(model: Any, ids: Tensor, states: Tensor) -> Tensor:
    """Final hidden states (B, T, H) of a model whose last block hands on `states`: what comes behind the blocks, alone."""
    blocks = find_blocks(model)[1]
    with _replaced(blocks, lambda block: lambda *args, **named: states):
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@contextmanager
def _replaced(blocks: nn.ModuleList, by: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Let each block do something else."""
    kept = [block.forward for block in blocks]
    try:
        for block in blocks:
            block.forward = by(block)
        yield
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            block.forward = forward


@contextmanager
def _recorded(blocks: nn.ModuleList, hidden: list[Tensor], arguments: list[dict[str, Any]]) -> Iterator[None]:
    """Let every block hand on what it reads, and note what it is given."""

    def recorder(block: nn.Module) -> Callable[..., Any]:
        def forward(states: Tensor, *others: Any, **named: Any) -> Any:
            hidden.append(states)
            names = list(block_parameters(block))[1 : 1 + len(others)]
            arguments.append({**dict(zip(names, others, strict=True)), **named})
            return states

        return forward

    with _replaced(blocks, recorder):
        yield


def block_parameters(block: nn.Module) -> list[str]:
    """Names of what a block's forward takes, the hidden states first."""
    import inspect

    return list(inspect.signature(type(block).forward).parameters)[1:]


def run_block(block: nn.Module, index: int, inputs: Inputs) -> Tensor:
    """Hidden states (B, T, H) behind block `index`."""
    found = block(inputs.hidden, **inputs.arguments[index])
    return found[0] if isinstance(found, tuple) else found


@torch.no_grad()
def observe(
    block: nn.Module,
    index: int,
    batches: Sequence[Inputs],
    layers: Mapping[str, nn.Module],
    see: Callable[[str, Tensor, Inputs], None],
) -> list[Tensor]:
    """Run a block and show what each of its `layers` reads: see(name, x (real tokens, in), batch). Returns its outputs."""
    outputs = []
    for batch in batches:
        handles = [module.register_forward_pre_hook(_shower(name, batch, see)) for name, module in layers.items()]
        try:
            outputs.append(run_block(block, index, batch))
        finally:
            for handle in handles:
                handle.remove()
    return outputs


@torch.no_grad()
def stages_of(block: nn.Module, index: int, batch: Inputs, layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names of the `layers` in the order in which they run, those that read the same tensor together."""
    read: dict[int, list[str]] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            kept.append(args[0])
            read.setdefault(args[0].data_ptr(), []).append(name)

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in layers.items()]
    try:
        run_block(block, index, batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(read.values())


def _shower(name: str, batch: Inputs, see: Callable[[str, Tensor, Inputs], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x, real = args[0], batch.real
        if x.shape[:2] == real.shape:
            x = x[real]
        elif x.shape[:-1] == (real.numel(),):  # a mixture of experts reads its tokens in rows
            x = x[real.flatten()]
        # An expert reads the tokens that are sent to it, in rows without a place in the batch.
        see(name, x.flatten(0, -2), batch)

    return hook
