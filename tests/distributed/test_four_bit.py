"""QLoRA: one trajectory however it is cut up, and that of PEFT and transformers on the same base."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from calibtrain.data.loader import step_indices
from calibtrain.data.templates import Template
from calibtrain.training.engine import schedule_factor
from tests.distributed.gradient_cases import FOUR_BIT_CASES, build, config_of, examples_of
from tests.distributed.ranks import run, torchrun
from tests.distributed.test_gradients import answer_score, error
from tests.tiny import tiny_tokenizer, write_tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.peer]
bitsandbytes = pytest.importorskip("bitsandbytes", reason="packs the base in four bits")

ON_ONE_RANK = tuple(name for name in FOUR_BIT_CASES if name.endswith("stage0"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four_bit")
    write_tiny_model(folder / "model")
    write_tiny_model(folder / "untied", tied=False)
    script = str(__file__).replace("test_four_bit", "gradient_cases")
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
    trained = {f"model.{name}": one.detach() for name, one in adapters.items()}
    assert error({name: mine["weights"][name] for name in trained}, trained) < 1e-5
    moved = error({f"model.{name}": ours[name].detach() for name in adapters}, trained)
    assert moved > 1e-2


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
