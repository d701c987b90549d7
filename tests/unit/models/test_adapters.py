"""LoRA as its section says: how it is scaled, and what else of a weight it trains."""

import math

import pytest

from calibtrain.config import LoRAConfig, ModelConfig, RunConfig
from calibtrain.models.adapters import add_lora
from tests.tiny import tiny_model


def adapted(**lora):
    model = add_lora(tiny_model(), ModelConfig(lora=LoRAConfig(r=4, alpha=8.0, **lora)))
    layer = next(one for one in model.modules() if hasattr(one, "lora_A"))
    return layer, {name for name, one in model.named_parameters() if one.requires_grad}


def test_the_scale_follows_the_rank_or_its_root():
    assert adapted()[0].scaling["default"] == 2.0
    assert adapted(rank_stabilized=True)[0].scaling["default"] == pytest.approx(8.0 / math.sqrt(4))


def test_dora_trains_the_lengths_of_rows_too():
    layer, trained = adapted(dora=True)
    assert any("lora_magnitude_vector" in name for name in trained)
    lengths = layer.lora_magnitude_vector["default"].weight
    assert lengths.allclose(layer.base_layer.weight.norm(dim=1))
    assert not any("magnitude" in name for name in adapted()[1])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"zero_stage": 3}}, "take zero_stage 0, 1 or 2"),
        ({"weight_penalties": [{"name": "polar_drift"}]}, "do not know the lengths"),
        ({"tracking": {"spectra_every": 10}}, "do not know the lengths"),
    ],
)
def test_what_dora_does_not_go_with_is_told(sections, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate({"model": {"lora": {"dora": True}}, **sections})
