"""QLoRA: one trajectory however it is cut up, and that of PEFT and transformers on the same base."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from calibtrain.data.loader import step_indices
from calibtrain.data.templates import Template
from calibtrain.pipeline.spectra import at_step
from calibtrain.training.engine import schedule_factor
from tests.distributed.gradient_cases import FOUR_BIT, FOUR_BIT_CASES
from tests.distributed.gradient_runs import build, config_of, examples_of
from tests.distributed.jobs import trained, write_job
from tests.distributed.ranks import run, torchrun
from tests.distributed.test_gradients import answer_score, error
from tests.tiny import tiny_tokenizer, write_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.peer]
bitsandbytes = pytest.importorskip("bitsandbytes", reason="packs the base in four bits")

STAGES = (2, 3)
ON_ONE_RANK = tuple(name for name in FOUR_BIT_CASES if name.endswith("stage0"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four_bit")
    write_tiny_model(folder / "model")
    write_tiny_model(folder / "untied", tied=False)
    script = str(__file__).replace("test_four_bit", "gradient_runs")
    for ranks, names in ((1, ON_ONE_RANK), (2, tuple(FOUR_BIT_CASES))):
        ended = run(torchrun(ranks, script, str(folder), ",".join(names)), folder)
        assert ended.code == 0, ended.output[-6000:]
    found = [(name, 1) for name in ON_ONE_RANK] + [(name, 2) for name in FOUR_BIT_CASES]
    return folder, {one: torch.load(folder / f"{one[0]}-{one[1]}.pt", weights_only=True) for one in found}


@pytest.mark.parametrize("name", FOUR_BIT_CASES)
def test_same_gradients_and_trajectory(results, name):
    found, expected = results[1][name, 2], results[1][f"{FOUR_BIT_CASES[name].family}_stage0", 1]
    assert len(found["gradients"]) == len(expected["gradients"]) > 1
    for one, reference in zip(found["gradients"], expected["gradients"], strict=True):
        assert all(".lora_" in parameter or "score" in parameter for parameter in one)
        assert error(one, reference) < 1e-6
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    assert error(found["weights"], expected["weights"]) < 1e-6
    assert found["said"] == expected["said"]


def test_the_steps_are_those_of_peft_and_transformers(results):
    """Three steps of their own: BitsAndBytesConfig, prepare_model_for_kbit_training, LoRA, torch's AdamW, plain logits."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder, found = results
    config = config_of(FOUR_BIT_CASES["four_bit_stage0"], folder / "model")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, quantization_config=four_bits)
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = LoraConfig(r=4, lora_alpha=8.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, settings).train()
    ours = dict(build(config).policy.model.named_parameters())
    adapters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert len(adapters) == 2 * 2 * 7
    with torch.no_grad():
        for name, one in adapters.items():
            one.copy_(ours[name])
    packed = [name for name, one in ours.items() if one.dtype == torch.uint8]
    assert len(packed) == 2 * 7
    assert all(torch.equal(ours[name], dict(model.named_parameters())[name]) for name in packed)

    training = config.training
    optimizer = torch.optim.AdamW(
        adapters.values(), lr=training.learning_rate, eps=training.adam_epsilon, weight_decay=training.weight_decay
    )
    mine = found["four_bit_stage0", 1]
    for step in range(3):
        sft_loss(model, config, step).backward()
        expected = {f"model.{name}": one.grad.clone() for name, one in adapters.items()}
        assert error(mine["gradients"][step], expected) < 1e-5
        norm = torch.nn.utils.clip_grad_norm_(adapters.values(), training.max_grad_norm)
        assert mine["norms"][step] == pytest.approx(float(norm), rel=1e-5)
        optimizer.param_groups[0]["lr"] = training.learning_rate * schedule_factor(step, 3, training)
        optimizer.step()
        optimizer.zero_grad()
    ended_at = {f"model.{name}": one.detach() for name, one in adapters.items()}
    assert error({name: mine["weights"][name] for name in ended_at}, ended_at) < 1e-5
    moved = error({f"model.{name}": ours[name].detach() for name in adapters}, ended_at)
    assert moved > 1e-2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Whole jobs of two ranks, and what they end with when they go on from their second checkpoint."""
    folder = tmp_path_factory.mktemp("jobs")
    model = {"source": str(folder / "untied"), "dtype": "bf16", "gradient_checkpointing": True, **FOUR_BIT}
    configs = [
        write_job(folder, f"stage{stage}", model=model, training={"zero_stage": stage, "keep_checkpoints": 9})
        for stage in STAGES
    ]
    ended = run(trained(2, *configs), folder)
    assert ended.code == 0, ended.output[-6000:]
    for stage in STAGES:
        output = folder / f"stage{stage}"
        (output / "model").rename(folder / f"model{stage}")
        shutil.rmtree(output / "checkpoints" / "step-0000006")
    ended = run([*trained(2, *configs), "training.resume=auto"], folder)
    assert ended.code == 0, ended.output[-6000:]
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_bit_for_bit(runs, stage):
    output = runs / f"stage{stage}"
    expected = load_file(runs / f"model{stage}" / "model.safetensors")
    found = load_file(output / "model" / "model.safetensors")
    start = load_file(runs / "untied" / "model.safetensors")
    assert found.keys() == expected.keys() == start.keys()
    assert all(found[name].equal(expected[name]) for name in found)
    assert {one.dtype for one in found.values()} == {torch.bfloat16}
    moved = {name for name in start if not found[name].equal(start[name].bfloat16())}
    assert moved == {name for name in start if "proj" in name}
    files = (output / "checkpoints" / "step-0000004" / "engine").glob("*.safetensors")
    held = sum(one.numel() for file in files for one in load_file(file).values() if one.numel() > 1)
    trained_elements = sum(one.numel() for one in load_file(output / "adapter" / "adapter_model.safetensors").values())
    assert held == 3 * trained_elements  # weights and two moments, and nothing of the base


def test_a_checkpoint_is_compared_with_what_the_run_started_from(runs):
    """What is frozen comes from the source again, and is unpacked as the run's layers did."""
    with at_step(runs / "stage2", 4) as compared:
        found = load_file(compared.tuned / "model.safetensors")
    start = load_file(runs / "untied" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert found["lm_head.weight"].equal(start["lm_head.weight"])
    assert 0 < (found[name] - start[name]).norm() < 0.2 * start[name].norm()


def sft_loss(model, config, step):
    """Cross-entropy over every token of the step but the first of each sequence, and the score of the graded answers."""
    template = Template("plain", tiny_tokenizer())
    examples = examples_of(config, template)
    total, tokens = 0.0, 0
    for (one,) in (examples[i] for i in step_indices(step, 8, len(examples), config.seed)):
        ids = torch.tensor([one.ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total, tokens = total + cross_entropy(logits, ids[0, 1:], reduction="sum"), tokens + len(one.ids) - 1
    return total / tokens + answer_score(model, config, template)
