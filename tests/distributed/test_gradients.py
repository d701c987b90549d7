"""One batch, however it is cut up and whichever op computes it, gives one trajectory.

Cuts: ranks, accumulation, ZeRO stage, packing, checkpointing; ops: the CPU kernel, PyTorch, the reference.
"""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from calibtrain.data.encode import Encoded, encode_answer
from calibtrain.data.loader import step_indices
from calibtrain.data.templates import Template
from calibtrain.losses import ANSWER, CHOSEN
from tests.distributed.gradient_cases import CASES
from tests.distributed.gradient_runs import (
    ANSWERS,
    FixedAnswers,
    build,
    config_of,
    examples_of,
    fixed_samples,
    records,
    trained,
)
from tests.distributed.ranks import forked, run
from tests.tiny import tiny_tokenizer, write_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1500)]

ON_ONE_RANK = (
    "stage0",
    "stage3",
    "sft_stage0",
    "dpo_stage0",
    "kto_stage0",
    "lora_stage0",
    "untied_stage0",
    "untied_lora_stage0",
    "rotation_stage0",
    "rollouts_stage0",
    "ppo_stage0",
    "ppo_own_stage0",
    "ppo_own_lora_stage0",
    "sampled_stage0",
    "chosen_stage0",
    "head_stage0",
    "rollouts_head_stage0",
)
REFERENCE = {
    "orpo": "stage0",
    "sft": "sft_stage0",
    "dpo": "dpo_stage0",
    "kto": "kto_stage0",
    "lora": "lora_stage0",
    "untied": "untied_stage0",
    "untied_lora": "untied_lora_stage0",
    "rotation": "rotation_stage0",
    "rollouts": "rollouts_stage0",
    "ppo": "ppo_stage0",
    "ppo_own": "ppo_own_stage0",
    "ppo_own_lora": "ppo_own_lora_stage0",
    "sampled": "sampled_stage0",
    "chosen": "chosen_stage0",
    "head": "head_stage0",
    "rollouts_head": "rollouts_head_stage0",
}
WRITTEN_OUT = tuple(family for family in REFERENCE if not family.startswith(("ppo", "sampled", "chosen")))
"""Families whose loss is written out below; what a round's credit is, tests/unit/training/test_rollout_rounds.py says."""
BF16 = tuple(name for name in CASES if name.startswith("bf16"))
SHARED_AT_ONCE = ("shared_checkpointed_stage3", "shared_packed_stage1", "sft_shared_stage1")
"""Ranks share rows: these in every run of the tests, the others in slow ones."""
SHARED_SLOW = tuple(name for name in CASES if "shared_" in name and name not in SHARED_AT_ONCE)
MORE_SLOW = (
    *(name for name in ON_ONE_RANK if name.endswith("stage0") and name != "stage0"),
    "stage3_persistent",
    "stage3_read_whole",
    "wide_micro_batches",
    "lora_stage1",
    "lora_reference_ops",
    "untied_stage1",
    "untied_stage2",
    "untied_reference_ops",
    "untied_lora_reference_ops",
    "untied_lora_stage1",
    "untied_lora_stage2",
    "rollouts_wide_stage1",
    "ppo_wide_stage1",
    "ppo_own_packed_stage2",
)
"""On two ranks in slow tests: each family is there at ZeRO-3 in every run, and each stage in some."""
ON_TWO_RANKS = tuple(name for name in CASES if name not in BF16 + SHARED_SLOW + MORE_SLOW)
RUNS = [*((name, 1) for name in ON_ONE_RANK), *((name, 2) for name in ON_TWO_RANKS)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    write_tiny_model(folder / "model")
    write_tiny_model(folder / "untied", tied=False)
    write_tiny_model(folder / "biased", tied=False, attention_bias=True)
    for ranks, names in ((1, (*ON_ONE_RANK, *BF16)), (2, ON_TWO_RANKS)):
        script = str(__file__).replace("test_gradients", "gradient_runs")
        ended = run(forked(ranks, script, str(folder), ",".join(names)), folder, 600)
        assert ended.code == 0, ended.output[-6000:]
    runs = (*RUNS, *((name, 1) for name in BF16))
    found = {(name, ranks): torch.load(folder / f"{name}-{ranks}.pt", weights_only=True) for name, ranks in runs}
    return folder, found


def error(found, expected):
    """Distance of all tensors together, relative to their length."""
    assert found.keys() == expected.keys()
    distance = sum((found[name].double() - expected[name].double()).square().sum() for name in expected)
    return math.sqrt(distance / sum(one.double().square().sum() for one in expected.values()))


@pytest.mark.parametrize(("name", "ranks"), RUNS)
def test_same_gradients_and_trajectory(results, name, ranks):
    found = results[1][name, ranks]
    expected = results[1][REFERENCE[CASES[name].family], 1]
    assert len(found["gradients"]) == len(expected["gradients"]) > 1
    for one, reference in zip(found["gradients"], expected["gradients"], strict=True):
        assert error(one, reference) < 1e-6
    # A rotation's few numbers are each the rest of large sums that cancel.
    bound = 1e-5 if CASES[name].family == "rotation" else 1e-6
    for tensor, reference in found["gradients"][0].items():
        assert error({"": reference}, {"": expected["gradients"][0][tensor]}) < bound, tensor
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    assert error(found["weights"], expected["weights"]) < 1e-6
    assert found["said"] == expected["said"]


@pytest.mark.slow
def test_four_ranks_that_read_a_quarter_each_take_the_same_steps(results):
    names = ("stage3", "stage3_read_whole", "lora_stage3", "untied_stage3", "ppo_own_stage3", "sampled_stage3")
    check_steps(results, 4, names)


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_in_every_other_way(results):
    check_steps(results, 2, MORE_SLOW)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_rows_take_the_same_steps(results, ranks):
    """On four ranks two groups of two, or one of four, which is twice as many as there are heads of keys."""
    alike = ("shared_separate_rows_stage2", "sft_shared_stage1", "untied_shared_stage3", "sampled_shared_stage1")
    by_four = tuple(name for name in SHARED_SLOW if "by_four" in name)
    check_steps(results, ranks, tuple(set(SHARED_SLOW) - set(by_four)) if ranks == 2 else (*by_four, *alike))


def check_steps(results, ranks, names):
    folder, known = results
    script = str(__file__).replace("test_gradients", "gradient_runs")
    ended = run(forked(ranks, script, str(folder), ",".join(names)), folder, 600)
    assert ended.code == 0, ended.output[-6000:]
    for name in names:
        found = torch.load(folder / f"{name}-{ranks}.pt", weights_only=True)
        expected = known[REFERENCE[CASES[name].family], 1]
        for one, reference in zip(found["gradients"], expected["gradients"], strict=True):
            assert error(one, reference) < 1e-6, name
        assert error(found["weights"], expected["weights"]) < 1e-6, name
        assert found["said"] == expected["said"]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_passes_left_out_of_deepspeed_change_no_bit(results, stage):
    found, expected = (results[1][f"bf16_stage{stage}{suffix}", 1] for suffix in ("", "_deepspeed"))
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    runs = ((*one["gradients"], one["weights"]) for one in (found, expected))
    for one, reference in zip(*runs, strict=True):
        assert one.keys() == reference.keys()
        assert all(torch.equal(one[name], reference[name]) for name in reference)


@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_gradient_is_that_of_the_global_mean(results, family):
    """Plain autograd in float64 over whole, unpadded sequences and the logits that the model itself gives."""
    folder, found = results
    config = config_of(CASES[REFERENCE[family]], folder / CASES[REFERENCE[family]].checkpoint)
    module = build(config).double().eval()
    loss = dense_loss(module.policy.model, config, family.removesuffix("_head"))
    if config.confidence_head is not None:
        loss = loss + head_loss(module, config)
    loss.backward()
    expected = {name: one.grad for name, one in trained(module) if one.grad is not None}
    first = found[REFERENCE[family], 1]
    assert error(first["gradients"][0], expected) < 1e-5  # the model's norms compute in float32
    assert first["norms"][0] == pytest.approx(norm(expected), rel=1e-4)


def norm(gradients):
    return math.sqrt(sum(one.square().sum() for one in gradients.values()))


def dense_loss(model, config, family):
    template = Template("plain", tiny_tokenizer())
    if family == "rollouts":
        return rollout_loss(model, config, template)
    examples = examples_of(config, template)
    step = [examples[i] for i in step_indices(0, 8, len(examples), config.seed)]
    if family in ("dpo", "kto"):
        ratios = torch.stack([torch.stack([log_ratio(model, one) for one in sequences]) for sequences in step])
        preferred = dpo(ratios) if family == "dpo" else kto(ratios, [group[0].role == CHOSEN for group in step])
        return preferred + answer_score(model, config, template)
    nll, tokens, odds = 0.0, 0, []
    for sequences in step:
        chosen = logprobs(model, sequences[0])
        nll, tokens = nll - chosen.sum(), tokens + chosen.shape[0]
        if family != "sft":
            means = [logprobs(model, one)[one.completion_start - 1 :].mean() for one in sequences]
            odds.append(logit(means[0]) - logit(means[1]))
    loss = nll / tokens
    if family != "sft":
        loss = loss - 0.5 * logsigmoid(torch.stack(odds)).mean()
    return loss + answer_score(model, config, template)


def log_ratio(model, encoded):
    return logprobs(model, encoded)[encoded.completion_start - 1 :].sum() - sum(encoded.reference_logprobs)


def dpo(ratios):
    return -logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()


def kto(ratios, desirable):
    point = ratios[:, 1].detach().mean()
    assert 1.0 < point < 20.0  # neither at the clamp nor where the sigmoid is flat
    gain = 0.1 * (ratios[:, 0] - point)
    return (1 - torch.where(torch.tensor(desirable), gain, -gain).sigmoid()).mean()


def rollout_loss(model, config, template):
    """GRPO's credit for being right, and the score of each answer's likelihood, means over the answers of the step."""
    samples, losses = fixed_samples(template), []
    for i in step_indices(0, 8, len(records()), config.seed):
        pair = samples[2 * i : 2 * i + 2]
        mean = (pair[0].correct + pair[1].correct) / 2
        for one in pair:
            prompt = template.prompt_ids(records()[i])
            logprob = logprobs(model, Encoded((*prompt, *one.tokens), len(prompt), ANSWER, i))[len(prompt) - 1 :]
            whole = logprob.sum()
            score = -whole if one.correct else -torch.log1p(-whole.exp())
            losses.append(-2.0 * (one.correct - mean) * logprob.mean() + 0.5 * score)
    return torch.stack(losses).mean()


def answer_score(model, config, template):
    stream = FixedAnswers(config.penalties, None, records(), 0, config.data.max_length)
    stream._ask(0)
    scores = []
    for i in range(ANSWERS):
        one = encode_answer(records()[i], stream.texts[i], stream.correct[i], template, config.data.max_length, i)
        logprob = logprobs(model, one)[one.completion_start - 1 :].sum()
        scores.append(-logprob if stream.correct[i] else -torch.log1p(-logprob.exp()))
    return torch.stack(scores).mean()


def head_loss(module, config):
    """The mean log score of what the head tells of each graded answer of the step."""
    template, head = Template("plain", tiny_tokenizer()), module.confidence_head
    asked, losses = records(), []
    if config.trains_on_rollouts:
        samples = fixed_samples(template)
        chosen = [one for i in step_indices(0, 8, len(asked), config.seed) for one in samples[2 * i : 2 * i + 2]]
        answers = [(template.prompt_ids(asked[one.question]), one.tokens, one.correct) for one in chosen]
    else:
        stream = FixedAnswers(config.penalties, None, asked, 0, config.data.max_length)
        stream._ask(0)
        answers = [
            (template.prompt_ids(asked[i]), template.completion_ids(stream.texts[i]), stream.correct[i])
            for i in range(ANSWERS)
        ]
    for prompt, tokens, correct in answers:
        output = module.policy.model(input_ids=torch.tensor([[*prompt, *tokens]]), output_hidden_states=True)
        before = slice(len(prompt) - 1, len(prompt) + len(tokens) - 1)
        table = output.logits[0, before].double().log_softmax(-1)
        logprob, entropy = table[range(len(tokens)), list(tokens)], -(table.exp() * table).sum(-1)
        states = torch.stack([output.hidden_states[layer][0, before] for layer in head.layers])
        picked = torch.stack([states[:, 0], states.mean(1), states[:, -1]], dim=1)
        readings = [logprob.mean(), logprob.min(), logprob[0], entropy.mean(), entropy.max()]
        given = [logprob.sum(), torch.stack([*readings, torch.tensor(math.log(len(tokens)))]), picked]
        given = given if head.trains_backbone else [one.detach() for one in given]
        told = head.logit(*(one[None] for one in given))[0]
        losses.append(-logsigmoid(told if correct else -told))
    return torch.stack(losses).mean()


def logprobs(model, encoded):
    ids = torch.tensor([encoded.ids])
    table = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return table.gather(1, ids[0, 1:, None])[:, 0]


def logit(logprob):
    return logprob - torch.log1p(-logprob.exp())
