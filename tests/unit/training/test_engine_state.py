"""Weights and moments that some ranks wrote, taken up by another: training goes on as if nothing had been."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.training.engine_state import follow, module_state, state_of, take_up, take_up_module_state
from calibtrain.training.shards import Shards, write_shard


class Module(nn.Module):
    """Parameters of every rank, one of which nothing reads, a buffer and an extra state."""

    def __init__(self, seed, width=3):
        super().__init__()
        torch.manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(width, 4))
        self.scale = nn.Parameter(torch.randn(()))
        self.one = nn.Parameter(torch.randn(1))
        self.unread = nn.Parameter(torch.randn(2))
        self.register_buffer("kept", torch.randn(2))
        self.register_buffer("made", torch.randn(2), persistent=False)
        self.extra = torch.randn(2, 2)

    def get_extra_state(self):
        return {"bank": [self.extra]}

    def set_extra_state(self, state):
        (self.extra,) = state["bank"]


class Blocks(torch.optim.SGD):
    """Keeps, of every parameter, codes that share a scale."""

    def step(self, closure=None):
        for one in self.param_groups[0]["params"]:
            if one.grad is not None:
                self.state[one] = {
                    "step": 3,
                    "codes": torch.arange(one.numel(), dtype=torch.uint8),
                    "scale": torch.ones(2),
                }
        return super().step(closure)


def engine(module, make=torch.optim.AdamW, **settings):
    optimizer = make(module.parameters(), lr=0.1, **settings)
    deepspeed = SimpleNamespace(
        optimizer=optimizer, basic_optimizer=optimizer, global_steps=0, global_samples=0, skipped_steps=0
    )
    return SimpleNamespace(stage=0, deepspeed=deepspeed, module=module)


def train(one, steps):
    for _ in range(steps):
        module, optimizer = one.module, one.deepspeed.optimizer
        optimizer.zero_grad()
        (module.matrix.square().sum() * module.scale + (module.one - 2).square().sum()).backward()
        optimizer.step()
        one.deepspeed.global_steps += 1


def write(folder, one, ranks):
    """As so many ranks do, all of which hold everything."""
    folder.mkdir()
    for rank in range(ranks):
        pieces, wholes, facts = state_of(one, World(rank, ranks, 0, torch.device("cpu")))
        write_shard(folder, rank, ranks, pieces, wholes, facts)
    return folder


def read(folder, one):
    with Shards(folder) as shards:
        take_up(one, shards)
    follow(one)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("trained_before", [0, 1])
def test_training_goes_on_bit_for_bit(tmp_path, ranks, fused, trained_before):
    first, second = (engine(Module(seed), fused=fused) for seed in (0, 1))
    train(first, 3)
    train(second, trained_before)  # going back to the best weights, say: what the optimiser has is written over
    read(write(tmp_path / "engine", first, ranks), second)
    assert second.deepspeed.global_steps == 3
    train(first, 2)
    train(second, 2)
    for (name, one), other in zip(first.module.named_parameters(), second.module.parameters(), strict=True):
        assert torch.equal(one, other), name
        mine, theirs = first.deepspeed.optimizer.state[one], second.deepspeed.optimizer.state[other]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_what_modules_keep_beside_their_parameters_comes_along():
    first, second = engine(Module(0)), engine(Module(1))
    made = second.module.made.clone()
    take_up_module_state(second, module_state(first))
    assert torch.equal(second.module.kept, first.module.kept)
    assert torch.equal(second.module.extra, first.module.extra)
    assert torch.equal(second.module.made, made)


def test_another_model_or_optimiser_is_refused(tmp_path):
    first = engine(Module(0))
    train(first, 1)
    folder = write(tmp_path / "engine", first, 2)
    with pytest.raises(UserError, match=r"written by the optimiser AdamW, and this run has SGD.*model\.source"):
        read(folder, engine(Module(0), torch.optim.SGD))
    with pytest.raises(UserError, match=r"matrix of shape \[3, 4\], and it is \[5, 4\] here: it is of another model"):
        read(folder, engine(Module(0, width=5)))
    larger = Module(0)
    larger.more = nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match="holds more not at all: it is of another model"):
        read(folder, engine(larger))


def test_moments_in_blocks_go_on_in_the_layout_that_wrote_them_alone(tmp_path):
    first, second = engine(Module(0), Blocks), engine(Module(1), Blocks)
    train(first, 1)
    folder = write(tmp_path / "engine", first, 2)
    read(folder, second)
    assert torch.equal(first.module.matrix, second.module.matrix)
    state = second.deepspeed.optimizer.state[second.module.matrix]
    assert state["step"] == 3
    assert state["codes"].dtype == torch.uint8
    assert torch.equal(state["codes"], first.deepspeed.optimizer.state[first.module.matrix]["codes"])
    with Shards(folder) as shards:
        shards._wholes = {f"0 {key}": one for key, one in shards._wholes.items()}  # cut elsewhere
        with pytest.raises(UserError, match=r"cannot be cut anew .* as many processes .* training\.zero_stage: 0"):
            take_up(second, shards)
