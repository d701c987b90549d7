"""A converted model is whole whichever process writes it."""

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import mixin

from calibtrain.models.loading import save_on_any_rank
from tests.tiny import tiny_model


def test_a_rank_other_than_0_writes_config_and_weights(tmp_path, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(mixin, "_is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr(mixin, "_get_torch_distributed_rank", lambda: 1)
    model.save_pretrained(tmp_path / "theirs")
    assert not list((tmp_path / "theirs").glob("*.safetensors"))  # which is why ours is there
    save_on_any_rank(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.dtype == model.dtype
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
