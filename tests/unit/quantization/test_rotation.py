"""A turned residual stream: the model computes what it did, and no channel of it stands out any more."""

from __future__ import annotations

import json

import pytest
import torch

from calibtrain.config import ModelConfig
from calibtrain.errors import UserError
from calibtrain.models.loading import load_model
from calibtrain.quantization.blocks import Text, find_blocks
from calibtrain.quantization.rotation import (
    final_norm_of,
    rotate_block,
    rotate_outside,
    rotation_of,
    spreading_matrix,
    why_not_rotated,
)
from calibtrain.quantization.run import Settings, check, quantize_directory
from calibtrain.quantization.schemes import scheme_of
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.quantization.test_folds import CONFIGS, build, logits, rms

REFUSED = ("gemma2", "gemma3", "gpt2")
TURNED = tuple(name for name in CONFIGS if name not in REFUSED)


def rotate(model, seed: int = 0) -> None:
    rotation = rotation_of(model, seed)
    for block in find_blocks(model)[1]:
        rotate_block(model, block, rotation)
    rotate_outside(model, rotation)


@pytest.mark.parametrize("width", [1, 7, 36, 64, 96, 576, 1536])
def test_a_spreading_matrix_is_orthogonal_and_flat(width):
    found = spreading_matrix(width, 0)
    assert (found @ found.T - torch.eye(width, dtype=torch.float64)).abs().max() < 1e-12
    assert found.abs().max() <= (2 / width) ** 0.5 + 1e-12
    assert width == 1 or not torch.equal(found, spreading_matrix(width, 1))


@pytest.mark.parametrize("name", TURNED)
def test_a_rotation_is_exact_in_float64(name, request):
    model = build(name, torch.float64)
    request.getfixturevalue("in_float64")
    before, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    rotate(model)
    assert (logits(model) - before).abs().max() < 1e-10
    same = [key for key, value in model.state_dict().items() if torch.equal(value, weights[key])]
    inner = ("q_norm", "k_norm", "q_proj.bias", "k_proj.bias", "gate_proj.bias", "up_proj.bias")
    assert all(any(part in key for part in inner) for key in same)
    gain = final_norm_of(model).weight
    assert (gain == (0 if name == "gemma" else 1)).all()


@pytest.mark.parametrize("name", TURNED)
def test_it_costs_no_more_than_rounding_in_bfloat16(name):
    model, same = build(name, torch.bfloat16), build(name, torch.bfloat16).float()
    before, in_float32 = logits(model).float(), logits(same)
    rotate(model)
    after = logits(model).float()
    mixture = "mixtral" in name or "moe" in name  # tokens near the border between two experts may go to the other one
    assert rms(after - before) < 2.5 * rms(before - in_float32)
    assert rms(logits(model.float()) - in_float32) < (2e-2 if mixture else 1e-2) * rms(before)


def test_a_tied_head_becomes_a_matrix_of_its_own():
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        final_norm_of(model).weight.uniform_(0.5, 2)
    before = logits(model)
    rotate(model)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert (logits(model) - before).abs().max() < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_norms_that_no_rotation_passes_are_told(name):
    assert "it is not rotated" in str(why_not_rotated(build(name, torch.float32)))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with a tied head and two channels of the stream that stand out."""
    path = tmp_path_factory.mktemp("rotated") / "model"
    model = tiny_model(hidden=64, layers=2, initializer_range=0.2, tie_word_embeddings=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [3, 17]] *= 60
        for norm in (final_norm_of(model), *(layer.input_layernorm for layer in model.model.layers)):
            norm.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    model.to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


TEXTS = [Text([5 + row, 6, 7, 8 + row], [9, 10 + row]) for row in range(32)]


def test_a_rotated_directory_loads_with_a_head_of_its_own_and_loses_less(source, tmp_path):
    losses = {}
    wanted = logits(load_model(ModelConfig(source=str(source)))).float()
    for rotated in (False, True):
        settings = Settings(scheme_of("w8a8"), "minmax", rotate=rotated)
        facts = quantize_directory(source, tmp_path / str(rotated), TEXTS, settings)
        assert facts["rotated"] is rotated
        losses[rotated] = rms(logits(load_model(ModelConfig(source=str(tmp_path / str(rotated))))).float() - wanted)
    assert losses[True] < 0.7 * losses[False]
    config = json.loads((tmp_path / "True" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("method", ["smoothquant", "preserve"])
def test_what_the_mlp_multiplies_alone_is_smoothed(source, tmp_path, method):
    facts = quantize_directory(source, tmp_path / "q", TEXTS, Settings(scheme_of("w8a8"), method, rotate=True))
    assert all(list(one) == ["mlp.up_proj"] for one in facts["folds"].values())


def test_an_architecture_that_cannot_turn_is_refused_before_the_work(tmp_path):
    build("gemma2", torch.bfloat16).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"--rotate: .*'gemma2'.*leave the option out"):
        check(tmp_path / "model", Settings(scheme_of("w8a8"), "minmax", rotate=True))
