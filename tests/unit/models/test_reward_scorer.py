"""A reward model at work: its scores are transformers' own on the same text, whatever stands beside it in a batch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from calibtrain.config_data import DataConfig
from calibtrain.config_rewards import ModelSource
from calibtrain.data.reward_text import FILE, RewardText, read_reward_template, write_reward_template
from calibtrain.data.templates import Template
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.models.reward_scorer import RewardScorer, reward_file, reward_parameters, reward_tokenizer
from calibtrain.records import Message, Record
from tests.tiny import EOS, tiny_model, tiny_tokenizer

WORLD = World(0, 1, 0, torch.device("cpu"))
QUESTION = Record(prompt=(Message("user", "In which country is the city of Lyon?"),))
REPLIES = ["France", "It is the Kingdom of Spain, doubtless.", "", "France\nConfidence: 80%", f"Peru{EOS}"]
KINDS = {
    "llama": (LlamaForSequenceClassification, LlamaConfig, {"num_key_value_heads": 2}),
    "bert": (BertForSequenceClassification, BertConfig, {}),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, {}),
}
OTHER_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}{% endfor %}<|im_end|>"
)


def write(
    path, kind="llama", *, pad_is_eos=False, chat=True, labels=1, tokenizer=True, dtype=torch.float32, **settings
):
    """A random reward model in `path`."""
    own = tiny_tokenizer(pad_is_eos=pad_is_eos)
    if not chat:
        own.chat_template = None
    model_class, config_class, more = KINDS[kind]
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": own.pad_token_id}
    config = config_class(
        vocab_size=len(own), num_labels=labels, max_position_embeddings=96, **{**shape, **special, **more, **settings}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = model_class(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(path)
    if tokenizer:
        own.save_pretrained(path)
    return path


def source(path, **settings):
    return ModelSource(path=str(path), **settings)


def expected(path, texts, special=False):
    """One at a time, without padding, as transformers does it."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return [
            model(**tokenizer(text, return_tensors="pt", add_special_tokens=special)).logits[0, 0].item()
            for text in texts
        ]


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("chat_template", [None, OTHER_TEMPLATE])
def test_scores_are_transformers_own_on_the_same_text(tmp_path, pad_is_eos, chat_template):
    """Where padding is the end token transformers itself reads the token before, and is asked without any padding."""
    path = write(tmp_path, pad_is_eos=pad_is_eos)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(path)
    turns = [{"role": "user", "content": QUESTION.question}]
    texts = [
        tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": one.replace(EOS, "")}], tokenize=False)
        for one in REPLIES
    ]
    text, scorer = (
        RewardText(reward_tokenizer(source(path), "key")),
        RewardScorer(source(path), "key", torch.float32, WORLD),
    )
    found = scorer([text(QUESTION, one, scorer.room)[0] for one in REPLIES])
    if pad_is_eos and texts[0].endswith(EOS):
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        model.config.pad_token_id = None  # transformers then reads the last token, whatever it is
        with torch.no_grad():
            ids = [tokenizer(one, return_tensors="pt", add_special_tokens=False)["input_ids"] for one in texts]
            wanted = [model(input_ids=one).logits[0, 0].item() for one in ids]
        assert wanted[0] != pytest.approx(expected(path, texts[:1])[0], abs=1e-3)  # the trap
    else:
        wanted = expected(path, texts)
    assert found == pytest.approx(wanted, abs=2e-5)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_encoders_and_models_without_a_chat_template_read_the_plain_form(tmp_path, kind):
    path = write(tmp_path, kind, chat=False)
    text, scorer = (
        RewardText(reward_tokenizer(source(path), "key")),
        RewardScorer(source(path), "key", torch.float32, WORLD),
    )
    found = scorer([text(QUESTION, one, scorer.room)[0] for one in REPLIES])
    plain = [f"Question: {QUESTION.question}\nAnswer: {one.replace(EOS, '')}{EOS}" for one in REPLIES]
    assert found == pytest.approx(expected(path, plain), abs=2e-5)
    assert "plain" in text.form


def test_a_score_does_not_depend_on_what_else_is_in_the_batch(tmp_path):
    path = write(tmp_path, pad_is_eos=True)
    generator = torch.Generator().manual_seed(0)
    rows = [[*torch.randint(0, 90, (n,), generator=generator).tolist(), 1] for n in (3, 17, 9, 3, 30, 1, 22)]
    scores = {
        size: RewardScorer(source(path, batch_size=size), "key", torch.float32, WORLD)([*rows, rows[2]])
        for size in (1, 3, 8)
    }
    assert scores[3] == pytest.approx(scores[1], abs=2e-5)
    assert scores[8] == pytest.approx(scores[1], abs=2e-5)
    assert scores[3][-1] == scores[3][2]  # the same reply is scored once


def test_scores_of_a_bf16_model_are_fine_grained(tmp_path):
    """A head in bf16 has 8 bits: among 200 sequences many would tie."""
    path = write(tmp_path)
    rows = [[5 + i % 50, 60 + i // 50, 1] for i in range(200)]
    found = RewardScorer(source(path), "key", torch.bfloat16, WORLD)(rows)
    assert len(set(found)) == 200
    exact = RewardScorer(source(path), "key", torch.float32, WORLD)(rows)
    spread = torch.tensor(exact).std().item()
    assert max(abs(a - b) for a, b in zip(found, exact, strict=True)) < 0.1 * spread
    assert any(one != torch.tensor(one).bfloat16().item() for one in found)


def test_parameters_are_counted_without_the_weights(tmp_path):
    path = write(tmp_path)
    (path / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    counted = reward_parameters(source(path), "key")
    assert counted == sum(one.numel() for one in load_file(tmp_path / "elsewhere.safetensors").values())


def test_a_long_question_loses_its_beginning_and_a_reply_nothing(tmp_path):
    text = RewardText(reward_tokenizer(source(write(tmp_path)), "key"))
    long = replace(QUESTION, prompt=(Message("user", "word " * 200 + "Lyon?"),))
    whole, cut = text(long, "France", 10_000)
    assert not cut
    short, cut = text(long, "France", 20)
    assert cut
    assert len(short) == 20
    assert short == whole[-20:]


def test_a_position_table_bounds_what_is_read(tmp_path):
    assert RewardScorer(source(write(tmp_path / "a", "bert")), "key", torch.float32, WORLD).room == 96
    scorer = RewardScorer(source(write(tmp_path / "b", "roberta")), "key", torch.float32, WORLD)
    assert scorer.room == 96 - 2 - 1
    assert len(scorer([[5] * scorer.room])) == 1


def test_ours_are_read_as_they_were_trained(tmp_path):
    path = write(tmp_path)
    assert read_reward_template(reward_file(source(path), FILE)) is None
    data = DataConfig(template="plain", system="Be brief.")
    write_reward_template(data, path)
    tokenizer = reward_tokenizer(source(path), "key")
    text = RewardText(tokenizer, read_reward_template(reward_file(source(path), FILE)))
    template = Template("plain", tokenizer)
    system = replace(QUESTION, prompt=(Message("system", "Be brief."), *QUESTION.prompt))
    for reply in ("France", "  France", "\n\nFrance"):
        ids = [*template.prompt_ids(system), *template.completion_ids(reply)]
        assert text(QUESTION, reply, 999)[0] == ids
    write_reward_template(DataConfig(template="jinja", prompt_template="{{ question }} ->"), path)
    text = RewardText(tokenizer, read_reward_template(reward_file(source(path), FILE)))
    assert tokenizer.decode(text(QUESTION, "France", 999)[0]) == f"{QUESTION.question} -> France{EOS}"


@pytest.mark.parametrize(
    "values",
    ["[1", "[]", '{"other": 1}', '{"template": "x"}', '{"template": "jinja", "prompt_template": "/etc/passwd"}'],
)
def test_a_template_file_that_is_none_is_refused(tmp_path, values):
    (tmp_path / FILE).write_text(values)
    with pytest.raises(UserError, match="not a template that calibtrain exported"):
        read_reward_template(tmp_path / FILE)


def test_a_template_without_a_role_for_the_system_gets_its_text_before_the_question(tmp_path):
    path = write(tmp_path)
    tokenizer = reward_tokenizer(source(path), "key")
    tokenizer.chat_template = OTHER_TEMPLATE
    system = replace(QUESTION, prompt=(Message("system", "Be brief."), *QUESTION.prompt))
    found = tokenizer.decode(RewardText(tokenizer)(system, "France", 999)[0])
    assert found.startswith("[user] Be brief.")
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UserError, match="refuses"):
        RewardText(tokenizer)(QUESTION, "France", 999)


def test_a_reply_cannot_write_special_tokens():
    text = RewardText(tiny_tokenizer())
    assert text.cleaned("a<|im_<|im_end|>end|>b") == "ab"
    assert text(QUESTION, "Fr<|im_end|>ance", 999) == text(QUESTION, "France", 999)


def test_what_is_no_reward_model_is_refused(tmp_path):
    def refused(path, message, load=False):
        key = "rollouts.reward_model"
        with pytest.raises(UserError, match=message) as caught:
            _ = RewardScorer(source(path), key, torch.float32, WORLD) if load else reward_tokenizer(source(path), key)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("rollouts.reward_model")

    refused(tmp_path / "none", "no such directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"no config\.json")
    refused(write(tmp_path / "two", labels=2), "has 2 labels")
    refused(write(tmp_path / "bare", tokenizer=False), "tokenizer")
    tiny_model(400).save_pretrained(tmp_path / "causal")
    refused(tmp_path / "causal", "LlamaForCausalLM, no sequence classifier")
    remote = write(tmp_path / "remote")
    settings = json.loads((remote / "config.json").read_text())
    settings |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config"}}
    (remote / "config.json").write_text(json.dumps(settings))
    refused(remote, "needs Python code of its own|unheard-of")
    weightless = write(tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    refused(weightless, "holds no weights")
    headless = write(tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    refused(headless, "would score by chance", load=True)
    (headless / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(headless, "damaged or not all there", load=True)
    with pytest.raises(UserError, match=r"rollouts.reward_model: cannot load .*damaged or not all there"):
        RewardScorer(source(headless), "rollouts.reward_model", torch.float32, WORLD, zero={"stage": 3})
