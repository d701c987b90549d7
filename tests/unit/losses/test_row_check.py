"""Packed rows and padding on the left give each family's own log-probs, or are refused before anything is learnt."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from calibtrain.data.collate import collate
from calibtrain.errors import UserError
from calibtrain.losses import SFTLoss, batch_from_labels, causal_lm_loss, row_check, token_stats_from_model
from calibtrain.models.attention_mask import attention_mask
from tests.flash import use_stand_in
from tests.tiny import tiny_model
from tests.unit.models.test_shared_prefix import sequences

SIZES = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OLD_NAMES = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}
APART = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "gemma2": ("Gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8, "head_dim": 8}),
    "gemma3": ("Gemma3Text", {"sliding_window": 8, "query_pre_attn_scalar": 8, "head_dim": 8}),
    "mistral_window": ("Mistral", {"sliding_window": 4}),
    "gpt_neox": ("GPTNeoX", {}),
    "phi": ("Phi", {}),
    "gpt2": ("GPT2", OLD_NAMES),
    "gpt_neo": (
        "GPTNeo",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 4},
    ),
}
TOGETHER = {
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon_alibi": ("Falcon", {"alibi": True}),
    "falcon_rotary": ("Falcon", {"alibi": False}),
    "bloom": ("Bloom", {"n_head": 4, "n_layer": 2}),
    "mpt": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 128}),
    "mamba": ("Mamba", {"state_size": 4}),
    "qwen3_next": ("Qwen3Next", {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16, "head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}),
    "bamba": ("Bamba", {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
        "attn_layer_indices": [1]}),
    "jamba": ("Jamba", {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2,
        "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}),
    "falcon_h1": ("FalconH1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_chunk_size": 8}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "rwkv": ("Rwkv", {}),
}  # fmt: skip
MASKED = {"gpt_oss", "opt", "falcon_rotary", "mpt"}
"""Families that keep sequences apart where they are given a mask of four dimensions."""
CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
LENGTHS = (9, 6, 12)


def model_of(family: str, attention: str = "eager"):
    """A random model in which the tokens before would show: large weights, but for what must stay small."""
    architecture, settings = {**APART, **TOGETHER}[family]
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **settings})
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        name = CLASSES.get(architecture, f"{architecture}ForCausalLM")
        model = getattr(transformers, name)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "conv" not in name:
                    parameter.normal_(std=0.2)
    return model


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 400, (length,), generator=generator) for length in LENGTHS]


def packed(rows: int = 1):
    """All sequences in a row, in each of `rows`."""
    ids = torch.cat(texts())[None].repeat(rows, 1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].repeat(rows, 1)
    return batch_from_labels(ids, ids, None, positions)


def padded(side: str):
    """A sequence a row."""
    ids, mask = torch.zeros((2, len(LENGTHS), max(LENGTHS)), dtype=torch.int64)
    for row, text in enumerate(texts()):
        place = slice(max(LENGTHS) - len(text), None) if side == "left" else slice(len(text))
        ids[row, place], mask[row, place] = text, 1
    return batch_from_labels(ids, ids.masked_fill(mask == 0, -100), mask)


@torch.no_grad()
def logprobs(model, batch, **inputs) -> torch.Tensor:
    return token_stats_from_model(model, batch, **inputs).logprob


def alone(model) -> torch.Tensor:
    return torch.cat([logprobs(model, batch_from_labels(one[None], one[None])) for one in texts()])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", APART)
def test_families_that_keep_sequences_apart(family: str, attention: str) -> None:
    try:
        model = model_of(family, attention)
    except ValueError:
        pytest.skip("this family has no such attention")
    expected = alone(model)
    for batch, times in ((packed(), 1), (packed(2), 2), (padded("right"), 1), (padded("left"), 1)):
        torch.testing.assert_close(logprobs(model, batch), expected.repeat(times), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", TOGETHER)
def test_families_that_do_not_are_refused(family: str) -> None:
    model = model_of(family)
    expected = alone(model)
    takes_positions = family not in ("bloom", "mpt", "mamba", "rwkv")
    for rows in (1, 2):
        batch = packed(rows)
        with pytest.raises(UserError, match="give one sequence a row") as refused:
            logprobs(model, batch)
        assert ("attention_mask=" in str(refused.value)) == (family in MASKED)
        # What would have been learnt from: the same inputs, past the check.
        inputs = {"position_ids": batch.position_ids} if takes_positions else {}
        with torch.no_grad():
            logits = model(batch.input_ids, use_cache=False, **inputs).logits.flatten(0, 1)[batch.target_positions]
        leaked = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        assert (leaked - expected.repeat(rows)).abs().max() > 5e-5
    torch.testing.assert_close(logprobs(model, padded("right")), expected, rtol=1e-5, atol=1e-5)
    if family == "rwkv":  # its state runs over the padding
        with pytest.raises(UserError, match="pad on the right"):
            logprobs(model, padded("left"))
    else:
        torch.testing.assert_close(logprobs(model, padded("left")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", sorted(MASKED))
def test_the_mask_that_the_message_names_is_a_way_out(family: str) -> None:
    model, batch = model_of(family), packed(2)
    mask = attention_mask(batch, model)
    torch.testing.assert_close(
        logprobs(model, batch, attention_mask=mask), alone(model).repeat(2), rtol=1e-5, atol=1e-5
    )
    open_mask = torch.full_like(mask, torch.finfo(mask.dtype).min).triu(1)
    row_check._found.clear()
    with pytest.raises(UserError, match="also with attention_mask"):
        logprobs(model, batch, attention_mask=open_mask)


def flash_stand_in(module, query, key, value, mask, scaling=None, dropout=0.0, position_ids=None, **options):
    """Keeps sequences apart by their positions as transformers' FlashAttention does: in batches of one row."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    width = query.shape[2]
    allowed = torch.ones((query.shape[0], 1, width, width), dtype=torch.bool).tril()
    if mask is not None:
        allowed = allowed & mask[:, None, None].bool() | torch.eye(width, dtype=torch.bool)
    elif query.shape[0] == 1:
        segments = (position_ids == 0).cumsum(1)
        allowed = allowed & (segments[:, :, None] == segments[:, None])[:, None]
    return sdpa_attention_forward(module, query, key, value, allowed, scaling=scaling, dropout=dropout)


def test_an_attention_by_positions_keeps_one_row_apart_and_several_not() -> None:
    transformers.AttentionInterface.register("stand_in", flash_stand_in)
    flash_mask = transformers.masking_utils.flash_attention_mask
    transformers.AttentionMaskInterface.register("stand_in", flash_mask)
    model = model_of("llama", "stand_in")
    expected = alone(model)
    for batch in (packed(), padded("left"), padded("right")):
        torch.testing.assert_close(logprobs(model, batch), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"batches of one packed row, or another attention \(model.set_attn"):
        logprobs(model, packed(2))
    model.set_attn_implementation("sdpa")  # another attention is tried for itself
    torch.testing.assert_close(logprobs(model, packed(2)), expected.repeat(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2", "gpt_neox", "qwen3_moe"])
def test_flash_attention_is_told_the_lengths_in_any_number_of_rows(name, monkeypatch) -> None:
    model = model_of(name, "eager")
    expected = alone(model)
    use_stand_in(monkeypatch)
    model.config._attn_implementation = "flash_attention_2"  # loading would ask for the package
    for batch, times in ((packed(), 1), (packed(2), 2), (padded("left"), 1), (padded("right"), 1)):
        torch.testing.assert_close(logprobs(model, batch), expected.repeat(times), rtol=1e-5, atol=1e-5)


def test_flash_attention_is_told_of_no_shared_prompts_and_given_no_mask(monkeypatch) -> None:
    use_stand_in(monkeypatch)
    model = model_of("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"with each completion, or take another attention$"):
        logprobs(model, collate(sequences(), 0, shared_prefix=True))


def test_the_trial_leaves_no_trace_and_is_made_once() -> None:
    def train(trials: bool):
        torch.manual_seed(3)
        model = tiny_model(num_hidden_layers=2, attention_dropout=0.3).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.model.layers[0].eval()  # what its owner froze stays so
        if not trials:
            row_check._found[model] = {(row_check.ROW, *key_of(model)): None}
        passes = []
        handle = model.register_forward_hook(lambda *_: passes.append(1))
        losses = []
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = causal_lm_loss(model, SFTLoss(), *inputs_of(packed()))
            loss.backward()
            losses.append((loss.detach(), len(passes)))
        handle.remove()
        assert [one.training for one in model.model.layers] == [False, True]
        assert model.training
        return losses, torch.cat([one.grad.flatten() for one in model.parameters()]), torch.get_rng_state()

    (tried, gradient, state), (plain, expected, expected_state) = train(True), train(False)
    assert [one for one, _ in tried] == [one for one, _ in plain]
    assert torch.equal(gradient, expected)
    assert torch.equal(state, expected_state)
    first, second = (passes for _, passes in tried)
    assert second - first == plain[0][1]
    assert first - plain[0][1] == 3


def inputs_of(batch):
    return batch.input_ids, batch.input_ids, None, batch.position_ids


def key_of(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checked = row_check.CheckedModel(model, model, model.lm_head)
        return checked.attention, checked.dtype


def test_a_copy_is_tried_for_itself_and_nothing_keeps_a_model_alive() -> None:
    model = model_of("llama")
    logprobs(model, packed())
    other = copy.deepcopy(model)
    known = len(row_check._found)
    other.model.layers[0].self_attn.forward = lambda hidden_states, **_: (hidden_states.cumsum(1), None)
    with pytest.raises(UserError, match="see each other"):
        logprobs(other, packed())
    assert len(row_check._found) == known + 1
    del other
    import gc

    gc.collect()
    assert len(row_check._found) == known


def test_shared_prompts_are_refused_without_a_mask_that_says_so() -> None:
    model = model_of("llama", "sdpa")
    batch, expected = collate(sequences(), 0, shared_prefix=True), collate(sequences(), 0)
    with pytest.raises(UserError, match="share their prompts"):
        logprobs(model, batch)
    found = logprobs(model, batch, attention_mask=attention_mask(batch, model))
    torch.testing.assert_close(found, logprobs(model, expected), rtol=1e-5, atol=1e-5)


def test_rows_wider_than_a_chunk_of_attention_are_refused() -> None:
    model = model_of("llama")
    model.config.attention_chunk_size = sum(LENGTHS) - 1
    with pytest.raises(UserError, match=f"rows of at most {sum(LENGTHS) - 1} tokens, not {sum(LENGTHS)}"):
        logprobs(model, packed())
    logprobs(model, padded("right"))


@pytest.mark.parametrize(
    ("positions", "place"),
    [
        ([0, 1, 2, 1, 2], "has 1 at token 3"),  # restarts, but not at 0
        ([1, 2, 3, 4, 5], "has 1 at token 0"),  # an offset
        ([0, 1, 2, 5, 6], "has 5 at token 3"),  # transformers would begin a sequence here
        ([0, 1, 1, 2, 3], "has 1 at token 2"),
    ],
)
def test_positions_that_do_not_say_where_sequences_begin(positions: list[int], place: str) -> None:
    ids = torch.arange(3, 8)[None].repeat(2, 1)
    both = torch.stack([torch.arange(5), torch.tensor(positions)])
    with pytest.raises(UserError, match=f"row 1 {place}"):
        batch_from_labels(ids, ids, None, both)


def test_positions_of_padding_say_nothing() -> None:
    ids, mask = torch.arange(3, 8)[None], torch.tensor([[0, 0, 1, 1, 1]])
    batch = batch_from_labels(ids, ids, mask, torch.tensor([[1, 1, 0, 1, 2]]))
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1, 1]]
    assert not batch.packed


def test_ranks_with_sharded_weights_make_as_many_passes_however_their_rows_are_laid_out(monkeypatch) -> None:
    """Each pass is collective there: one that only one rank made would be waited for for ever."""
    monkeypatch.setattr(row_check.CheckedModel, "sharded", True)

    def passes(batch, **inputs) -> list[int]:
        model, found = model_of("llama"), []
        model.register_forward_hook(lambda *_: found.append(1))
        counts = []
        for _ in range(2):
            logprobs(model, batch, **inputs)
            counts.append(len(found))
        return counts

    mask = attention_mask(packed(), model_of("llama"))
    rows = padded("right")
    assert passes(packed()) == passes(packed(2)) == passes(rows) == [10, 11]
    own = {"attention_mask": (rows.segment_ids > 0).long()}
    assert passes(packed(), attention_mask=mask) == passes(rows, **own) == [3, 4]
