"""What a running vLLM is given: all weights under the names of the model's own files, tied ones under both."""

import json

import pytest
from safetensors.torch import load_file

from calibtrain.training.handed_weights import _write_tied
from tests.tiny import tiny_model


def written(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_written_under_both_names(tmp_path, tied, shard):
    model = tiny_model(tied=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    _write_tied(model, tmp_path)
    found = written(tmp_path)
    assert set(found) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert found["lm_head.weight"].equal(model.get_output_embeddings().weight)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (shard == "40KB")
    if index.exists():
        places = json.loads(index.read_text())["weight_map"]
        assert {name: (tmp_path / file).is_file() for name, file in places.items()} == dict.fromkeys(found, True)
