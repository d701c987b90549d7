"""What an error at each token does to the answers, block by block as by one pass through the whole model."""

from __future__ import annotations

import pytest
import torch

from calibtrain.quantization.blocks import Text, batches_of, first_inputs, matrices_in
from calibtrain.quantization.preserve import token_weights
from calibtrain.quantization.streaming import StreamedModel
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model(hidden=32, layers=3, initializer_range=0.2).save_pretrained(path)
    return StreamedModel(path)


TEXTS = [Text([5, 6, 7, 8], [9, 10]), Text([11, 12], [13]), Text([20, 21, 22], [23, 24, 25, 26])]


def weights_of(streamed, texts, **named):
    layers = {}
    for index, block in enumerate(streamed.blocks):
        layers |= matrices_in(block, f"{streamed.name_of(index)}.")
    batches = first_inputs(streamed.model, texts, streamed.pad_id)
    return token_weights(streamed, layers, texts, batches, **named), batches


def by_one_pass(model, names, texts, log_odds, seed=0):
    """The same by autograd through the whole model, text after text, without padding or batches."""
    ((ids, real, predicts),) = batches_of(texts, 0)
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[predicts]
    drawn = iter(torch.multinomial(logprobs.exp(), 1, generator=torch.Generator().manual_seed(seed))[:, 0].tolist())
    modules, rows = dict(model.named_modules()), {name: [] for name in names}
    for row in range(len(ids)):
        own, places = ids[row][real[row]][None], predicts[row][real[row]]
        kept = {}
        handles = [
            modules[name].register_forward_hook(
                lambda module, args, output, name=name, kept=kept: kept.update({name: output})
            )
            for name in names
        ]
        found = model(input_ids=own).logits[0].log_softmax(-1)[places]
        for handle in handles:
            handle.remove()
        targets = torch.tensor([next(drawn) for _ in range(int(places.sum()))])
        said = found.gather(1, own[0].roll(-1)[places][:, None]).sum()
        losses = -found.gather(1, targets[:, None]).sum(), said - torch.log(-torch.expm1(said))
        squares = [
            [
                one.square().sum(-1)[0]
                for one in torch.autograd.grad(loss, [kept[name] for name in names], retain_graph=True)
            ]
            for loss in losses
        ]
        for name, kl, odds in zip(names, *squares, strict=True):
            rows[name].append((kl + log_odds * odds, places))
    for name, parts in rows.items():
        mean = torch.cat([part[places] for part, places in parts]).mean()
        rows[name] = [part / mean for part, _ in parts]
    return rows


@pytest.mark.parametrize("log_odds", [0.0, 1.0])
def test_weights_are_those_of_one_pass_through_the_model(streamed, log_odds):
    found, batches = weights_of(streamed, TEXTS, log_odds=log_odds)
    model = tiny_model(hidden=32, layers=3, initializer_range=0.2)
    wanted = by_one_pass(model, list(found), TEXTS, log_odds)
    for name, parts in found.items():
        for row, expected in enumerate(wanted[name]):
            torch.testing.assert_close(parts[0][row][batches[0].real[row]], expected, rtol=2e-3, atol=1e-5)


def test_padding_and_what_follows_the_answer_weigh_nothing(streamed):
    found, batches = weights_of(streamed, TEXTS)
    after = batches[0].real.sum(1) - 1  # the last token of an answer predicts nothing that was said
    for parts in found.values():
        assert float(parts[0][~batches[0].real].abs().max()) == 0
        assert all(float(parts[0][row, last]) == 0 for row, last in enumerate(after.tolist()))
        assert float(parts[0][batches[0].predicts].mean()) == pytest.approx(1.0)


def test_blocks_are_let_go(streamed):
    weights_of(streamed, TEXTS)
    assert all(one.is_meta for block in streamed.blocks for one in block.parameters())
