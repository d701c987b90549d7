"""A converted model is whole whichever process writes it."""

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from calibtrain.models.loading import save_on_any_rank
from tests.tiny import tiny_model


def test_a_rank_other_than_0_writes_config_and_weights(tmp_path):
    model = tiny_model()
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        save_on_any_rank(model, tmp_path)
    finally:
        dist.destroy_process_group()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.dtype == model.dtype
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
