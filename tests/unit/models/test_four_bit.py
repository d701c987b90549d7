"""A base in four bits: what is packed, what it takes, what comes out of it, and what is said where it cannot be had."""

import importlib.util
import json

import pytest
import torch
from torch import nn

from calibtrain.config import LoRAConfig, ModelConfig, RunConfig
from calibtrain.errors import UserError
from calibtrain.models.export import export_adapter, export_model, gathered_weights
from calibtrain.models.four_bit import SCALE_BYTES, dense, is_packed, keep_packed, packed_layers
from calibtrain.models.loading import check_weights, load_model, load_tokenizer
from calibtrain.models.policy import Policy, check_head
from tests.tiny import tiny_model, write_tiny_model

FOUR_BIT = {"lora": {"r": 4, "alpha": 8.0, "load_in_4bit": True}}
IDS = torch.arange(20, 52)[None]
without = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is not None,
    reason="bitsandbytes is installed: its absence is told elsewhere",
)


@pytest.mark.parametrize(
    "sections", [{"weight_penalties": [{"name": "polar_drift"}]}, {"tracking": {"spectra_every": 10}}]
)
def test_what_reads_the_starting_weights_is_refused(sections):
    with pytest.raises(ValueError, match=r"cannot read weights that model\.lora\.load_in_4bit packs"):
        RunConfig.model_validate({"model": FOUR_BIT, **sections})


def test_dora_of_packed_weights_still_needs_whole_ones():
    with pytest.raises(ValueError, match=r"model\.lora\.dora"):
        RunConfig.model_validate(
            {"model": {"lora": {"load_in_4bit": True, "dora": True}}, "training": {"zero_stage": 3}}
        )


@without
def test_a_missing_package_is_told_before_anything_is_loaded(tmp_path):
    config = ModelConfig(source=str(write_tiny_model(tmp_path)), **FOUR_BIT)
    with pytest.raises(UserError, match=r'needs bitsandbytes: run `pip install "calibtrain\[qlora\]"`'):
        check_weights(config)
    with pytest.raises(UserError, match="needs bitsandbytes"):
        load_model(config)


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_layers_but_the_head_are_packed(tied):
    model = tiny_model(tied=tied)
    assert len(packed_layers(model)) == 2 * 7
    assert model.lm_head not in packed_layers(model)


def test_a_model_whose_layers_could_not_be_written_back_is_refused():
    import transformers

    odd = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(UserError, match="Conv1D"):
        packed_layers(odd)


def adapted(folder, dtype, tied=False, **lora):
    """A model in four bits whose adapters are not those of the start."""
    source = write_tiny_model(folder / "tiny", tied=tied, hidden=64)
    section = LoRAConfig(**{"r": 4, "alpha": 8.0, "load_in_4bit": True, **lora})
    config = ModelConfig(source=str(source), dtype=dtype, lora=section)
    policy = Policy(load_model(config)).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for one in policy.parameters():
            if one.requires_grad:
                one.add_(torch.randn_like(one), alpha=0.05)
    return policy, config


def plain_names(module):
    return {name for name, _ in module.named_parameters()}


@torch.no_grad()
def said(model):
    return model(input_ids=IDS, use_cache=False).logits[0].float().log_softmax(-1)


@pytest.mark.peer
class TestWithBitsandbytes:
    """What bitsandbytes itself makes of the same weights."""

    @pytest.fixture(autouse=True)
    def _there(self):
        pytest.importorskip("bitsandbytes", reason="packs the base in four bits")

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_packed_weights_are_bitsandbytes_own_and_the_rest_is_as_it_was(self, tmp_path, dtype, tied):
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        policy, config = adapted(tmp_path, dtype, tied)
        plain = dict(load_model(config.model_copy(update={"lora": None})).named_parameters())
        layers = {id(layer.weight) for layer in packed_layers(load_model(config.model_copy(update={"lora": None})))}
        assert len(layers) == 2 * 7
        packed = 0
        for name, one in policy.causal_model.named_parameters():
            if ".lora_" in name:
                assert one.requires_grad
                assert one.dtype == plain["lm_head.weight" if not tied else "model.embed_tokens.weight"].dtype
                continue
            assert not one.requires_grad
            start = plain[name.replace(".base_layer", "")].detach()
            if not is_packed(one):
                assert one.equal(start)
                continue
            packed += 1
            expected, state = quantize_4bit(start, blocksize=64, compress_statistics=True, quant_type="nf4")
            assert one.detach().equal(expected)
            assert dense(one).equal(dequantize_4bit(expected, state))
            assert dense(one).dtype == start.dtype
        assert packed == 2 * 7
        assert not is_packed(policy.causal_model.get_output_embeddings().weight)
        assert policy.state_dict().keys() - plain_names(policy) <= {
            "model.base_model.model.lm_head.weight"
        }  # a tied one

    def test_what_a_packed_weight_takes(self, tmp_path):
        from bitsandbytes.functional import quantize_4bit

        data, state = quantize_4bit(torch.randn(1024, 1024), compress_statistics=True, quant_type="nf4")
        tensors = (data, state.absmax, state.state2.absmax)
        held = sum(one.numel() * one.element_size() for one in tensors)
        assert held == pytest.approx(2**20 * (0.5 + SCALE_BYTES), rel=1e-6)

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_answering_in_between_leaves_training_as_it_was(self, tmp_path, dtype):
        """bitsandbytes packs weights otherwise in evaluation mode on some CPUs, and then gives no gradient."""
        policy, _ = adapted(tmp_path, dtype)
        check_head(policy)
        before = said(policy.model)
        policy.train()
        loss = policy.model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        gradients = [one.grad for one in policy.parameters() if one.requires_grad]
        assert all(one is not None and one.abs().sum() > 0 for one in gradients)
        assert said(policy.eval().model).equal(before)

    @pytest.mark.parametrize("lora", [{}, {"dora": True, "rank_stabilized": True}])
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_the_exported_model_says_what_the_trained_one_said(self, tmp_path, dtype, lora):
        from transformers import AutoModelForCausalLM

        policy, config = adapted(tmp_path, dtype, **lora)
        expected = said(policy.model)
        export_model(policy, config, load_tokenizer(config), tmp_path / "out")
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
        assert {one.dtype for one in loaded.parameters()} == {policy.causal_model.lm_head.weight.dtype}
        assert (said(loaded) - expected).abs().max() < (1e-4 if dtype == "fp32" else 0.05)
        start = AutoModelForCausalLM.from_pretrained(config.source, dtype=loaded.dtype)
        assert (said(start) - expected).abs().max() > 0.1

    def test_merging_rounds_once(self, tmp_path):
        """The merged weight is the unpacked one and the adapter's product, added in fp32."""
        from safetensors.torch import load_file

        policy, config = adapted(tmp_path, "bf16")
        export_model(policy, config, load_tokenizer(config), tmp_path / "out")
        layer = policy.causal_model.model.layers[0].mlp.down_proj
        product = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float() * 2.0
        expected = (dense(layer.base_layer.weight).float() + product).bfloat16()
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found["model.layers.0.mlp.down_proj.weight"].equal(expected)

    def test_peft_loads_the_adapter_beside_a_base_in_four_bits(self, tmp_path):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        policy, config = adapted(tmp_path, "fp32")
        export_adapter(policy, config, tmp_path / "adapter")
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        base = AutoModelForCausalLM.from_pretrained(config.source, dtype=torch.float32, quantization_config=four_bits)
        keep_packed(base)  # else bitsandbytes computes in bf16 on some CPUs
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(said(loaded), said(policy.model), atol=1e-5, rtol=1e-5)

    def test_gathered_weights_are_dense(self, tmp_path):
        policy, _ = adapted(tmp_path, "bf16")
        found = gathered_weights(policy, keep=True)
        assert all(one.is_floating_point() for one in found.values())
        linear = [one for name, one in policy.named_modules() if isinstance(one, nn.Linear) and "base_layer" in name]
        assert {one.weight.numel() for one in linear} == {one.in_features * one.out_features // 2 for one in linear}
