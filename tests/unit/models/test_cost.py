"""Operations counted from shapes are those that torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from calibtrain.config import LoRAConfig, ModelConfig
from calibtrain.models.cost import causal, device_of, peak_flops, work_of
from calibtrain.models.loading import add_lora
from tests.tiny import tiny_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [None, 4])
def test_operations_are_those_that_torch_counts(tied, lora):
    model = tiny_model(tied=tied, _attn_implementation="eager")
    if lora:
        model = add_lora(model, ModelConfig(lora=LoRAConfig(r=lora)))
        model.enable_input_require_grads()
    work = work_of(model)
    tokens = torch.randint(3, 400, (2, 24))
    with FlopCounterMode(display=False) as counted:
        loss = model(input_ids=tokens, use_cache=False).logits.float().mean()
    forward = counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        loss.backward()
    whole = 2 * 24 * 24  # eager attention computes what the mask then hides
    angles = 2 * 24 * 2 * 8 // 2  # of the rotary embedding, by a product
    assert work.forward(48, 48, whole) == pytest.approx(forward, abs=2 * angles)
    # Of the first layer's adapters, too, torch takes the gradient of the input, which is trained here.
    assert work.step(48, 48, whole) == pytest.approx(forward + counted.get_total_flops(), abs=2 * angles)


def test_causal_attention_is_half():
    assert causal([1, 3]) == 1 + 6


def test_devices_are_known_by_name_and_none_is_invented():
    assert device_of("NVIDIA H100 80GB HBM3").bf16 == 989e12
    assert device_of("NVIDIA A100-SXM4-80GB").fp32 == 19.5e12
    assert device_of("NVIDIA L40S").bf16 != device_of("NVIDIA L4").bf16
    assert device_of("Tesla T4") is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
