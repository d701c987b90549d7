"""ORPO, GRPO and the Jensen-Shannon divergence against Liger-Kernel's chunked losses, which run on a CPU."""

from __future__ import annotations

import pytest
import torch

from calibtrain.losses import ANSWER, CHOSEN, REJECTED, Batch, GRPOLoss, ORPOLoss, batch_from_labels, mean_loss
from calibtrain.losses.calibration_tuning import jensen_shannon
from calibtrain.ops import fused_linear_token_stats
from tests.numerics.dense import Row, batch_of

pytestmark = pytest.mark.peer

HIDDEN, VOCABULARY = 8, 40


@pytest.fixture(scope="module")
def liger():
    return pytest.importorskip("liger_kernel.chunked_loss", reason="Liger-Kernel is the oracle")


def leaves(rows, width, seed=0, scale=1.0):
    """Hidden states (rows, width, H) and head (V, H), float32."""
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(rows, width, HIDDEN, generator=generator)
    return hidden.requires_grad_(), torch.randn(VOCABULARY, HIDDEN, generator=generator, requires_grad=True)


def completions(lengths, width, seed=1):
    """Targets (rows, width), -100 behind each row's length."""
    targets = torch.randint(VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    return targets.masked_fill(torch.arange(width) >= torch.tensor(lengths)[:, None], -100)


def pairs_batch(targets) -> Batch:
    """The chosen rows, then the rejected ones; state t of a row predicts its target t."""
    half = targets.shape[0] // 2
    where = (targets != -100).flatten().nonzero()[:, 0]
    rows = [Row(CHOSEN if i < half else REJECTED, row[row != -100].tolist()) for i, row in enumerate(targets)]
    made = batch_of(rows)
    fields = {name: getattr(made, name) for name in made.__dataclass_fields__}
    return Batch(**{**fields, "target_positions": where, "pair_ids": torch.arange(half).repeat(2)})


def through_ops(objective, hidden, weight, batch):
    flat = hidden.flatten(0, 1)[batch.target_positions]
    return mean_loss(objective(fused_linear_token_stats(flat, weight, batch.targets), batch))


def assert_agree(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(one, inputs) for one in (ours, theirs))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_orpo_equals_liger(liger):
    """Theirs takes the likelihood over the chosen completions' tokens, as our defaults do."""
    targets = completions([5, 3, 6, 2, 6, 4], 6)
    hidden, weight = leaves(6, 6)
    theirs, _ = liger.LigerFusedLinearORPOLoss(beta=0.3, compiled=False)(weight, hidden, targets)
    ours = through_ops(ORPOLoss(beta=0.3), hidden, weight, pairs_batch(targets))
    assert_agree(ours, theirs, (hidden, weight))


def test_a_sure_pair_has_a_gradient_here_and_none_at_all_in_liger(liger):
    """P(chosen) rounds to 1: log(1 - P) is -inf in theirs, and so its gradients are NaN, in every row."""
    targets = torch.tensor([[3, -100], [4, -100]])
    hidden, weight = leaves(2, 2)
    with torch.no_grad():
        weight.zero_()[3, 0] = 1.0
        hidden.zero_()[0, :, 0] = 200.0
    theirs, _ = liger.LigerFusedLinearORPOLoss(beta=0.3, compiled=False)(weight, hidden, targets)
    assert torch.autograd.grad(theirs, weight)[0].isnan().any()
    ours = through_ops(ORPOLoss(beta=0.3), hidden, weight, pairs_batch(targets))
    assert ours.isfinite()
    assert all(one.isfinite().all() for one in torch.autograd.grad(ours, (hidden, weight)))


def test_an_empty_completion_is_left_out_here_and_spoils_the_step_in_liger(liger):
    targets = completions([3, 4, 2, 0], 4)
    hidden, weight = leaves(4, 4)
    theirs, _ = liger.LigerFusedLinearORPOLoss(beta=0.3, compiled=False)(weight, hidden, targets)
    assert theirs.isnan()
    ours = through_ops(ORPOLoss(beta=0.3), hidden, weight, pairs_batch(targets))
    nll = through_ops(ORPOLoss(beta=0.0), hidden, weight, pairs_batch(targets))
    one_pair = through_ops(ORPOLoss(beta=0.3), hidden[[0, 2]], weight, pairs_batch(targets[[0, 2]]))
    assert ours.isfinite()
    torch.testing.assert_close(
        ours - nll, one_pair - through_ops(ORPOLoss(beta=0.0), hidden[[0, 2]], weight, pairs_batch(targets[[0, 2]]))
    )


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("kind", "norm", "length"),
    [
        ("grpo", "sequence", None),
        ("bnpo", "token", None),
        ("dapo", "token", None),
        ("dr_grpo", "constant", 7),
    ],
)
def test_grpo_equals_liger(liger, kind, norm, length, beta):
    """Each published normaliser; bnpo's and dapo's are the same on the one micro-batch of a step."""
    targets, generator = completions([5, 2, 6, 4], 6), torch.Generator().manual_seed(4)
    hidden, weight = leaves(4, 6)
    mask = (targets != -100).long()
    with torch.no_grad():
        current = (hidden @ weight.t()).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    old = current + 0.3 * torch.randn(4, 6, generator=generator)
    reference = current + 0.5 * torch.randn(4, 6, generator=generator)
    credit = torch.randn(4, generator=generator)
    oracle = liger.LigerFusedLinearGRPOLoss(
        beta=beta,
        compiled=False,
        use_ref_model=beta > 0,
        epsilon_high=0.28,
        loss_type=kind,
        max_completion_length=length,
    )
    theirs, _ = oracle(
        hidden,
        weight,
        targets.clamp(min=0),
        mask,
        credit,
        ref_per_token_logps=reference if beta else None,
        old_per_token_logps=old,
    )
    made = batch_of([Row(ANSWER, row[row != -100].tolist()) for row in targets])
    fields = {name: getattr(made, name) for name in made.__dataclass_fields__}
    kept = mask.bool()
    batch = Batch(
        **{
            **fields,
            "target_positions": kept.flatten().nonzero()[:, 0],
            "advantages": credit[made.sequence_ids],
            "old_logprob": old[kept],
            "reference_logprob": reference[kept],
        }
    )
    objective = GRPOLoss(norm=norm, length=length, clip_high=0.28, beta=beta, kl="k3")
    assert_agree(through_ops(objective, hidden, weight, batch), theirs, (hidden, weight))


def test_jensen_shannon_equals_liger(liger):
    (student, weight), (teacher, other) = leaves(1, 9), leaves(1, 9, seed=5)
    student, teacher = student.detach()[0].requires_grad_(), teacher.detach()[0]
    oracle = liger.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
    theirs = oracle(student, weight, teacher, other.detach(), torch.arange(9))
    ours = jensen_shannon((student @ weight.t()).log_softmax(-1), (teacher @ other.t()).log_softmax(-1).detach()).mean()
    assert_agree(ours, theirs, (student, weight))


def test_labels_of_a_collator_give_the_same_orpo(liger):
    """TRL's preference rows through `batch_from_labels` are what Liger sees after the usual shift by one."""
    ids = torch.randint(1, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(2))
    labels = ids.masked_fill(torch.arange(7) < torch.tensor([2, 3, 2, 1])[:, None], -100)
    hidden, weight = leaves(4, 7)
    theirs, _ = liger.LigerFusedLinearORPOLoss(beta=0.3, compiled=False)(weight, hidden[:, :-1], labels[:, 1:])
    ours = through_ops(ORPOLoss(beta=0.3), hidden, weight, batch_from_labels(ids, labels, pairs=True))
    assert_agree(ours, theirs, (hidden, weight))
