"""The DeepSpeed JSON of a run, derived from RunConfig; a JSON of the user's own is checked against it and completed.

The optimizer and the learning-rate schedule are ours and go to `deepspeed.initialize` as objects, so the JSON names
neither. What the trainer must know about the engine's arithmetic (deepspeed 0.19, `DeepSpeedEngine.backward`):

- `engine.backward(loss)` divides by the accumulation steps; `engine.backward(loss, scale_wrt_gas=False)` does not.
- `engine.step()` belongs after every `engine.backward`: it is what counts micro-batches, and it updates at the last
  one of a step. Called once a step, it would update only every accumulation-steps-th time.
- gradients are averaged over the data-parallel ranks in every stage (`gradient_allreduce_op: mean`).

So a loss that is already divided by its global count is multiplied by the world size before
`engine.backward(loss, scale_wrt_gas=False)`, and by nothing else. With `sequence_parallel_size` all ranks stay
data-parallel to DeepSpeed (no `mpu`): ZeRO shards over all of them, and averages the part of the gradient that each has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibtrain.config import RunConfig, TrainingConfig
from calibtrain.errors import UserError
from calibtrain.models.arithmetic import settled

BUCKET_ELEMENTS = 10_000_000
"""DeepSpeed's default of 5e8 elements makes buffers of 1 to 2 GB on each rank; 20 MB in bf16 fill a link as well."""

REFUSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "fp16": (lambda v: _enabled(v), "fp16 is not supported: set model.dtype to bf16 or fp32"),
    "amp": (lambda v: _enabled(v), "amp is not supported: set model.dtype to bf16 or fp32"),
    "torch_autocast": (lambda v: _enabled(v), "torch_autocast is not supported: set model.dtype to bf16 or fp32"),
    "elasticity": (lambda v: _enabled(v), "elastic batch sizes would change the loss's normalisation"),
    "hybrid_engine": (lambda v: _enabled(v), "the hybrid engine is not supported"),
    "curriculum_learning": (lambda v: _enabled(v), "the data order is calibtrain's own, so that resuming is exact"),
    "data_efficiency": (lambda v: _enabled(v), "the data order is calibtrain's own, so that resuming is exact"),
    "managed_gradient_accumulation": (lambda v: v is False, "the trainer relies on DeepSpeed counting micro-batches"),
    "gradient_allreduce_op": (lambda v: v not in ("mean", "auto"), "the loss is scaled for the mean over ranks"),
    "data_parallel_size": (
        lambda v: v != "auto",
        "it follows from the number of processes; beside sequence_parallel_size DeepSpeed would average over fewer "
        "ranks than the loss is scaled for",
    ),
    "tensor_parallel": (
        lambda v: isinstance(v, dict) and v.get("autotp_size", 0) not in (0, 1),
        "tensor parallelism is not supported: shard the parameters with ZeRO-3",
    ),
}
"""Sections of a user's JSON that the trainer cannot honour, when each does harm, and why."""


OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
    "adamw": ("adamw", "adam"),
    "adamw_8bit": ("adamw8bit", "adamw_8bit", "adamw_bnb_8bit"),
}
"""By training.optimizer, the types by which a user's JSON may repeat it, in lower case."""
KNOWN_TO_ZERO = ("adamw",)
"""Those that DeepSpeed's ZeRO takes without being told to."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How many records one optimiser step takes, and how they are cut up."""

    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    sequence_parallel_size: int = 1

    @property
    def groups(self) -> int:
        """Groups of ranks, each with micro-batches of its own; of one rank each, unless ranks share their rows."""
        return self.world_size // self.sequence_parallel_size

    @property
    def global_batch_size(self) -> int:
        """Records in one optimiser step over all ranks."""
        return self.micro_batch_size * self.accumulation_steps * self.groups


def batch_plan(training: TrainingConfig, world_size: int) -> BatchPlan:
    """Accumulation steps for `world_size` ranks.

    Raises UserError when global_batch_size cannot be cut up evenly, or the ranks make no whole groups.
    """
    micro, total, shared = training.micro_batch_size, training.global_batch_size, training.sequence_parallel_size
    if world_size % shared:
        raise UserError(
            f"training.sequence_parallel_size: {shared} ranks share each row, and {world_size} process(es) make no whole "
            f"groups of {shared}: start a multiple of {shared}, or set {_nearest_divisor(world_size, shared)}"
        )
    groups = world_size // shared
    if total % (micro * groups) == 0:
        return BatchPlan(micro, total // (micro * groups), world_size, shared)
    step = micro * groups
    totals = [size for size in (total // step * step, (total // step + 1) * step) if size > 0]
    ways = [f"training.global_batch_size={' or '.join(map(str, totals))}"]
    if total % groups == 0:
        ways.append(f"training.micro_batch_size={_nearest_divisor(total // groups, micro)}")
    if total % micro == 0:
        ways.append(f"{_nearest_divisor(total // micro, groups) * shared} process(es)")
    where = f"{groups} group(s) of {shared}" if shared > 1 else f"{world_size}"
    raise UserError(
        f"training.global_batch_size: {total} cannot be cut into micro-batches of {micro} "
        f"(training.micro_batch_size) on {where} process(es): it must be a multiple of {step}. "
        f"Nearest ways: {'; or '.join(ways)}."
    )


def _nearest_divisor(number: int, wanted: int) -> int:
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return min([*low, *(number // size for size in low)], key=lambda size: (abs(size - wanted), size))


def deepspeed_dict(config: RunConfig, world_size: int, *, hidden_size: int | None = None) -> dict[str, Any]:
    """The resolved DeepSpeed config, as written to deepspeed.json and given to `deepspeed.initialize(config=...)`.

    `hidden_size` fills the "auto" bucket sizes of a user's own JSON by the Hugging Face rule; without it DeepSpeed's
    defaults stand. Raises UserError for batch sizes that cannot be met and for a JSON that contradicts the config.
    """
    config = settled(config)
    ours = _derived(config, batch_plan(config.training, world_size))
    if config.training.deepspeed is None:
        return ours
    path = config.training.deepspeed
    theirs = _read_json(path)
    problems = _contradictions(theirs, ours, config)
    if problems:
        raise UserError("\n".join([f"{path} contradicts the config:", *(f"  {problem}" for problem in problems)]))
    for section in ("optimizer", "scheduler", "bfloat16"):
        theirs.pop(section, None)
    return _fill(theirs, {**ours, "zero_optimization": {**ours["zero_optimization"], **_auto_buckets(hidden_size)}})


def sharding(config: RunConfig, world_size: int) -> dict[str, Any] | None:
    """The DeepSpeed config by which models are loaded in parts, each rank its own; None below ZeRO-3."""
    return deepspeed_dict(config, world_size) if config.training.zero_stage == 3 else None


def _derived(config: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    training, bf16 = config.training, config.model.dtype == "bf16"
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.zero_stage:
        zero["reduce_bucket_size"] = BUCKET_ELEMENTS
    if training.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = BUCKET_ELEMENTS
    if training.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if training.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    resolved: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": bf16},
        "zero_optimization": zero,
        "steps_per_print": None,  # progress is a hook's work
    }
    if plan.sequence_parallel_size > 1:
        resolved["sequence_parallel_size"] = plan.sequence_parallel_size  # DeepSpeed counts batches by it, and no more
    if training.offload_optimizer:
        resolved["zero_force_ds_cpu_optimizer"] = (
            False  # ours is not DeepSpeed's: nothing is compiled at the first step
        )
    if training.zero_stage and training.optimizer not in KNOWN_TO_ZERO:
        resolved["zero_allow_untested_optimizer"] = True  # tested here: tests/distributed/test_eight_bit.py
    if bf16 and training.zero_stage >= 2:
        # Micro-batches add up in fp32: in bf16 a sum of many small gradients stops growing.
        resolved["data_types"] = {"grad_accum_dtype": "fp32"}
        resolved["communication_data_type"] = "fp32"
    return resolved


def _read_json(path: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise UserError(f"{path}: key {key!r} is written twice; delete one of them")
            values[key] = value
        return values

    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=no_duplicates)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"training.deepspeed: {path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object, this file holds a {type(values).__name__}")
    for section in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "data_types"):
        if section in values and not isinstance(values[section], dict):
            raise UserError(f"{path}: {section} is a JSON object, got {values[section]!r}")
    return values


def _contradictions(theirs: dict[str, Any], ours: dict[str, Any], config: RunConfig) -> list[str]:
    """Where a user's JSON says something else than the config; "auto" and absent keys never do."""
    training, zero = config.training, theirs.get("zero_optimization", {})
    offload = {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    checks: list[tuple[str, Any, Any, str]] = [
        ("train_batch_size", theirs.get("train_batch_size", "auto"), ours["train_batch_size"],
         "training.global_batch_size"),
        ("train_micro_batch_size_per_gpu", theirs.get("train_micro_batch_size_per_gpu", "auto"),
         ours["train_micro_batch_size_per_gpu"], "training.micro_batch_size"),
        ("gradient_accumulation_steps", theirs.get("gradient_accumulation_steps", "auto"),
         ours["gradient_accumulation_steps"], "training.global_batch_size / (training.micro_batch_size * processes)"),
        ("gradient_clipping", theirs.get("gradient_clipping", "auto"), training.max_grad_norm,
         "training.max_grad_norm"),
        ("zero_optimization.stage", zero.get("stage", "auto"), training.zero_stage, "training.zero_stage"),
        ("sequence_parallel_size", theirs.get("sequence_parallel_size", "auto"), training.sequence_parallel_size,
         "training.sequence_parallel_size"),
    ]  # fmt: skip
    for name in ("bf16", "bfloat16"):
        enabled = theirs.get(name, {}).get("enabled", "auto")
        checks.append((f"{name}.enabled", enabled, config.model.dtype == "bf16", "model.dtype"))
    problems = [
        f'{key}: {value!r}, but {setting} makes it {expected!r}; change one of them, or write "auto"'
        for key, value, expected, setting in checks
        if value != "auto" and value != expected
    ]
    for key, setting in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        if (offload[key] not in ("none", None, "auto")) != getattr(training, setting) and key in zero:
            problems.append(
                f"zero_optimization.{key}.device: {offload[key]!r}, but training.{setting} is "
                f"{str(getattr(training, setting)).lower()}; change one of them"
            )
    problems += [
        f'zero_optimization.{key}.device: "nvme" is not supported: checkpoints keep what is in memory; "cpu" is'
        for key, device in offload.items()
        if device == "nvme"
    ]
    problems += [f"{key}: {why}" for key, (harms, why) in REFUSED.items() if key in theirs and harms(theirs[key])]
    return problems + _optimizer_problems(theirs, training)


def _optimizer_problems(theirs: dict[str, Any], training: TrainingConfig) -> list[str]:
    """The optimizer and the schedule are built from the config; the JSON may repeat them, not change them."""
    problems = []
    optimizer = theirs.get("optimizer", {})
    ours = training.optimizer
    if str(optimizer.get("type", "auto")).lower() not in (*OPTIMIZERS[ours], "auto"):
        problems.append(
            f"optimizer.type: {optimizer['type']!r}, but training.optimizer is {ours}, of {', '.join(OPTIMIZERS)}; delete "
            "the section"
        )
    if theirs.get("zero_allow_untested_optimizer") is False and training.zero_stage and ours not in KNOWN_TO_ZERO:
        problems.append(f"zero_allow_untested_optimizer: false, but training.optimizer is {ours}; leave it out")
    expected: dict[str, Any] = {
        "lr": training.learning_rate, "betas": list(training.adam_betas), "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
    }  # fmt: skip
    settings = {"lr": "learning_rate", "betas": "adam_betas", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
    for key, value in optimizer.get("params", {}).items():
        if key in expected and value not in ("auto", expected[key]):
            problems.append(
                f"optimizer.params.{key}: {value!r}, but training.{settings[key]} is {expected[key]!r}; "
                'change one of them, or write "auto"'
            )
    parameters = theirs.get("scheduler", {}).get("params", {})
    if any(value != "auto" for value in parameters.values()):
        problems.append(
            "scheduler.params: the schedule is training.schedule and training.warmup_ratio; "
            'delete the section, or write "auto" for its values'
        )
    return problems


def _auto_buckets(hidden_size: int | None) -> dict[str, int]:
    if hidden_size is None:
        return {}
    return {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def _fill(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Their values, with ours for every "auto" and for the top-level keys that they leave out."""
    filled = _without_auto(theirs, ours)
    for key, value in ours.items():
        if key == "zero_optimization":  # their section stands; only what they left to us is filled in
            filled.setdefault(key, {}).setdefault("stage", value["stage"])
            for part in ("offload_optimizer", "offload_param"):
                if part in value:
                    filled[key].setdefault(part, value[part])
        else:
            filled.setdefault(key, value)
    return filled


def _without_auto(theirs: dict[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Replace "auto" by our value; where we have none the key goes, and DeepSpeed's default stands."""
    result: dict[str, Any] = {}
    for key, value in theirs.items():
        mine = ours.get(key)
        if isinstance(value, dict):
            result[key] = _without_auto(value, mine if isinstance(mine, dict) else {})
        elif value != "auto":
            result[key] = value
        elif mine is not None:
            result[key] = mine
    return result


def _enabled(section: Any) -> bool:
    return isinstance(section, dict) and section.get("enabled", False) not in (False, "auto")
