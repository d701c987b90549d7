"""The mean of the last weights: which steps enter it, and that a resume changes no bit of it, wherever the weights lie."""

import pytest
import torch

from calibtrain.losses.rotation_step import share
from calibtrain.training.averaging import WeightAverage

STEPS = 6


def model(device="cpu"):
    return torch.nn.Linear(3, 2, device=device)


def train(average, module, steps):
    for step in steps:
        with torch.no_grad():
            for number, parameter in enumerate(module.parameters()):
                parameter.fill_(step / 7 + number)
        average.after_step(step)


def test_the_last_share_of_the_steps_enters():
    module = model()
    average = WeightAverage(module, 0.5, STEPS)
    train(average, module, range(1, STEPS + 1))
    average.apply()
    assert average.count == 3
    torch.testing.assert_close(module.weight, torch.full((2, 3), (4 + 5 + 6) / 3 / 7))


def checkpointed(average):
    """What `Shards.read` does, of the pieces that one rank gives."""
    pieces = {piece.name: piece for piece in average.pieces()}

    def read(name, key, start, into):
        own = pieces[name].tensors[key][start - pieces[name].start :][: into.numel()]
        into.copy_(own.clone())

    return average.count, read


@pytest.mark.parametrize("cut", [2, 4, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resume_changes_no_bit(cut, dtype):
    modules = [model().to(dtype) for _ in range(3)]
    whole, first, second = (WeightAverage(one, 0.7, STEPS) for one in modules)
    train(whole, modules[0], range(1, STEPS + 1))
    train(first, modules[1], range(1, cut + 1))
    second.load(*checkpointed(first))
    train(second, modules[2], range(cut + 1, STEPS + 1))
    assert second.count == whole.count > 0
    assert all(second.means[name].equal(mean) for name, mean in whole.means.items())


def test_ranks_of_another_number_take_up_their_own_elements():
    saved = WeightAverage(module := model(), 1.0, STEPS)
    train(saved, module, [1, 2])
    parts = [WeightAverage(model(), 1.0, STEPS, rank, 4) for rank in range(4)]
    for part in parts:
        part.load(*checkpointed(saved))
    for name, mean in saved.means.items():
        assert torch.cat([part.means[name][: stop - start] for part, (start, stop) in owned(parts, name)]).equal(mean)


def owned(parts, name):
    return [(part, share(part.parameters[name].numel(), part.rank, part.ranks)) for part in parts]


def test_the_means_of_a_checkpoint_go_where_the_weights_lie():
    """A checkpoint is read into host memory; what is added to a mean lies on the weights' device."""
    saved = WeightAverage(module := model(), 1.0, STEPS)
    train(saved, module, [1, 2])
    elsewhere = WeightAverage(model("meta"), 1.0, STEPS)
    elsewhere.load(*checkpointed(saved))
    assert {mean.device.type for mean in elsewhere.means.values()} == {"meta"}
    elsewhere.after_step(3)
    assert elsewhere.count == 3
