"""Every way to cut up one batch, by name: ranks, ZeRO stage, packing, checkpointing, ops; gradient_runs.py runs them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.distributed.jobs import SHARDED


@dataclass(frozen=True)
class Case:
    """A way to run the same trajectory; `family` names what must come out the same."""

    family: str
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)  # more keys for DeepSpeed's zero_optimization
    objective: str = "orpo"
    losses: dict[str, Any] = field(default_factory=dict)  # sections in the place of the usual ones
    checkpoint: str = "model"  # "untied": a head of its own; "biased": and biases in attention
    ops: str = ""  # CALIBTRAIN_OPS
    head: dict[str, Any] | None = None  # keys of a confidence head
    whole_load: bool = False  # ZeRO-3 takes apart a model that each rank has read whole, instead of reading its part
    own_passes: bool = True  # False: DeepSpeed's own passes over the gradients (training/gradient_passes.py)


BF16 = {"dtype": "bf16"}
LORA = {"lora": {"r": 4, "alpha": 8.0}}
ROTATION = {"adapter": {"kind": "shared_rotation", "rank": 4}}
CASES = {
    "stage0": Case("orpo", training={"zero_stage": 0}),
    "stage1": Case("orpo", training={"zero_stage": 1}),
    "stage2": Case("orpo", training={"zero_stage": 2}),
    "stage3": Case("orpo", training={"zero_stage": 3}, zero=SHARDED),
    "stage3_persistent": Case("orpo", training={"zero_stage": 3}),
    "stage3_read_whole": Case("orpo", training={"zero_stage": 3}, zero=SHARDED, whole_load=True),
    "packed": Case("orpo", data={"packing_tokens": 128}),
    "separate_rows": Case("orpo", data={"shared_prefix": False}),
    "wide_micro_batches": Case("orpo", training={"micro_batch_size": 4}),
    "checkpointed_stage3": Case(
        "orpo", model={"gradient_checkpointing": True}, training={"zero_stage": 3}, zero=SHARDED
    ),
    "sft_stage0": Case("sft", training={"zero_stage": 0}, objective="sft"),
    "sft_packed_stage3": Case(
        "sft", data={"packing_tokens": 128}, training={"zero_stage": 3}, zero=SHARDED, objective="sft"
    ),
    "dpo_stage0": Case("dpo", model=LORA, training={"zero_stage": 0}, objective="dpo"),
    "dpo_packed_stage3": Case(
        "dpo",
        model=LORA,
        data={"packing_tokens": 128, "shared_prefix": False},
        training={"zero_stage": 3},
        zero=SHARDED,
        objective="dpo",
    ),
    "kto_stage0": Case("kto", training={"zero_stage": 0}, objective="kto"),
    "kto_wide_stage3": Case("kto", training={"zero_stage": 3, "micro_batch_size": 4}, zero=SHARDED, objective="kto"),
    "lora_stage0": Case("lora", model=LORA, training={"zero_stage": 0}),
    "lora_stage1": Case("lora", model=LORA, training={"zero_stage": 1}),
    "lora_checkpointed_stage2": Case(
        "lora", model={**LORA, "gradient_checkpointing": True}, training={"zero_stage": 2}
    ),
    "lora_stage3": Case("lora", model=LORA, training={"zero_stage": 3}, zero=SHARDED),
    "lora_reference_ops": Case("lora", model=LORA, training={"zero_stage": 0}, ops="reference"),
    "untied_stage0": Case("untied", training={"zero_stage": 0}, checkpoint="untied"),
    "untied_stage1": Case("untied", training={"zero_stage": 1}, checkpoint="untied"),
    "untied_stage2": Case("untied", training={"zero_stage": 2}, checkpoint="untied"),
    "untied_stage3": Case("untied", training={"zero_stage": 3}, zero=SHARDED, checkpoint="untied"),
    "untied_offload_stage3": Case(
        "untied",
        training={"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        zero=SHARDED,
        checkpoint="untied",
    ),
    "untied_reference_ops": Case("untied", training={"zero_stage": 0}, checkpoint="untied", ops="reference"),
    "untied_lora_reference_ops": Case(
        "untied_lora", model=LORA, training={"zero_stage": 0}, checkpoint="untied", ops="reference"
    ),
    **{
        f"untied_lora_stage{stage}": Case(
            "untied_lora",
            model=LORA,
            training={"zero_stage": stage},
            checkpoint="untied",
            zero=SHARDED if stage == 3 else {},
        )
        for stage in range(4)
    },
    "rotation_stage0": Case("rotation", model=ROTATION, training={"zero_stage": 0}, checkpoint="biased"),
    "rotation_stage3": Case("rotation", model=ROTATION, training={"zero_stage": 3}, checkpoint="biased", zero=SHARDED),
    **{
        f"bf16_stage{stage}{'' if own else '_deepspeed'}": Case(
            "", model=BF16, training={"zero_stage": stage, "max_grad_norm": 1e9}, own_passes=own
        )
        for stage in (1, 2)
        for own in (True, False)
    },
    "rollouts_stage0": Case("rollouts", training={"zero_stage": 0}, objective="grpo"),
    "rollouts_separate_rows_stage3": Case(
        "rollouts", data={"shared_prefix": False}, training={"zero_stage": 3}, zero=SHARDED, objective="grpo"
    ),
    "head_stage0": Case("head", training={"zero_stage": 0}, head={}),
    "head_packed_stage3": Case("head", data={"packing_tokens": 128}, training={"zero_stage": 3}, zero=SHARDED, head={}),
    "rollouts_head_stage0": Case(
        "rollouts_head", training={"zero_stage": 0}, objective="grpo", head={"trains_backbone": True}
    ),
    "rollouts_head_separate_rows_stage3": Case(
        "rollouts_head",
        data={"shared_prefix": False},
        training={"zero_stage": 3},
        zero=SHARDED,
        objective="grpo",
        head={"trains_backbone": True},
    ),
    "rollouts_wide_stage1": Case("rollouts", training={"zero_stage": 1, "micro_batch_size": 4}, objective="grpo"),
    # PPO passes twice over a round of answers, some of them cut, so that the second step is off-policy.
    "ppo_stage0": Case("ppo", training={"zero_stage": 0}, objective="ppo"),
    "ppo_separate_rows_stage3": Case(
        "ppo", data={"shared_prefix": False}, training={"zero_stage": 3}, zero=SHARDED, objective="ppo"
    ),
    "ppo_packed_stage2": Case(
        "ppo", data={"shared_prefix": False, "packing_tokens": 192}, training={"zero_stage": 2}, objective="ppo"
    ),
    "ppo_wide_stage1": Case("ppo", training={"zero_stage": 1, "micro_batch_size": 4}, objective="ppo"),
    "ppo_own_stage0": Case("ppo_own", training={"zero_stage": 0}, objective="ppo_own", checkpoint="untied"),
    "ppo_own_packed_stage2": Case(
        "ppo_own",
        data={"shared_prefix": False, "packing_tokens": 192},
        training={"zero_stage": 2},
        objective="ppo_own",
        checkpoint="untied",
    ),
    "ppo_own_stage3": Case(
        "ppo_own", training={"zero_stage": 3}, zero=SHARDED, objective="ppo_own", checkpoint="untied"
    ),
    "ppo_own_lora_stage0": Case("ppo_own_lora", model=LORA, training={"zero_stage": 0}, objective="ppo_own"),
    "ppo_own_lora_stage3": Case(
        "ppo_own_lora", model=LORA, training={"zero_stage": 3}, zero=SHARDED, objective="ppo_own"
    ),
    # These answers are the policy's own: whichever rank asks a question, they are the same.
    "sampled_stage0": Case("sampled", training={"zero_stage": 0}, objective="sampled"),
    "sampled_stage3": Case("sampled", training={"zero_stage": 3}, zero=SHARDED, objective="sampled"),
    # And of these, groups alike are thrown away: as many others are asked, however many ranks there are.
    "chosen_stage0": Case("chosen", training={"zero_stage": 0}, objective="chosen"),
    "chosen_stage3": Case("chosen", training={"zero_stage": 3}, zero=SHARDED, objective="chosen"),
    # Ranks have one micro-batch in common, and a part of its positions each.
    "shared_stage0": Case("orpo", training={"zero_stage": 0, "sequence_parallel_size": 2}),
    "shared_checkpointed_stage3": Case(
        "orpo",
        model={"gradient_checkpointing": True},
        training={"zero_stage": 3, "sequence_parallel_size": 2},
        zero=SHARDED,
    ),
    "shared_packed_stage1": Case(
        "orpo", data={"packing_tokens": 130}, training={"zero_stage": 1, "sequence_parallel_size": 2}
    ),
    "shared_separate_rows_stage2": Case(
        "orpo", data={"shared_prefix": False}, training={"zero_stage": 2, "sequence_parallel_size": 2}
    ),
    "sft_shared_stage1": Case("sft", training={"zero_stage": 1, "sequence_parallel_size": 2}, objective="sft"),
    "dpo_shared_stage3": Case(
        "dpo", model=LORA, training={"zero_stage": 3, "sequence_parallel_size": 2}, zero=SHARDED, objective="dpo"
    ),
    "kto_shared_stage1": Case("kto", training={"zero_stage": 1, "sequence_parallel_size": 2}, objective="kto"),
    "untied_shared_stage3": Case(
        "untied", training={"zero_stage": 3, "sequence_parallel_size": 2}, zero=SHARDED, checkpoint="untied"
    ),
    "shared_by_four_stage1": Case("orpo", training={"zero_stage": 1, "sequence_parallel_size": 4}),
    "sft_shared_by_four_stage3": Case(
        "sft", training={"zero_stage": 3, "sequence_parallel_size": 4}, zero=SHARDED, objective="sft"
    ),
    "rollouts_shared_stage3": Case(
        "rollouts", training={"zero_stage": 3, "sequence_parallel_size": 2}, zero=SHARDED, objective="grpo"
    ),
    "sampled_shared_stage1": Case(
        "sampled", training={"zero_stage": 1, "sequence_parallel_size": 2}, objective="sampled"
    ),
    "reference_ops": Case("orpo", training={"zero_stage": 0}, ops="reference"),
    "torch_ops_stage3": Case("orpo", training={"zero_stage": 3}, zero=SHARDED, ops="torch"),
}
FOUR_BIT = {"lora": {"r": 4, "alpha": 8.0, "load_in_4bit": True}}
FOUR_BIT_CASES = {
    "four_bit_stage0": Case("four_bit", model=FOUR_BIT, training={"zero_stage": 0, "max_steps": 3}, objective="sft"),
    "four_bit_stage1": Case("four_bit", model=FOUR_BIT, training={"zero_stage": 1, "max_steps": 3}, objective="sft"),
    "four_bit_packed_checkpointed_stage2": Case(
        "four_bit",
        model={**FOUR_BIT, "gradient_checkpointing": True},
        data={"packing_tokens": 128},
        training={"zero_stage": 2, "max_steps": 3},
        objective="sft",
    ),
    "four_bit_checkpointed_stage3": Case(
        "four_bit",
        model={**FOUR_BIT, "gradient_checkpointing": True},
        training={"zero_stage": 3, "max_steps": 3},
        zero=SHARDED,
        objective="sft",
        whole_load=True,
    ),
    "four_bit_untied_stage0": Case(
        "four_bit_untied", model=FOUR_BIT, training={"zero_stage": 0}, checkpoint="untied", ops="reference"
    ),
    "four_bit_untied_offload_stage3": Case(
        "four_bit_untied",
        model=FOUR_BIT,
        training={"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        zero=SHARDED,
        checkpoint="untied",
        whole_load=True,
    ),
    **{
        f"four_bit_{name}_stage{stage}": Case(
            f"four_bit_{name}",
            model=FOUR_BIT,
            training={"zero_stage": stage},
            zero=SHARDED if stage == 3 else {},
            objective=name,
            whole_load=stage == 3,
        )
        for name in ("sampled", "ppo_own")
        for stage in (0, 2, 3)
    },
}
"""On a base in four bits; they need bitsandbytes, and are run by test_four_bit."""
EIGHT_BIT = {"optimizer": "adamw_8bit", "max_steps": 3, "max_grad_norm": 1e9, "weight_decay": 0.1}
WIDE_LORA = {"lora": {"r": 32, "alpha": 32.0}}
EIGHT_BIT_CASES = {
    f"eight_bit_{name}stage{stage}": Case(
        "eight_bit",
        model=model,
        training={**EIGHT_BIT, **more, "zero_stage": stage},
        zero=SHARDED if stage == 3 else {},
        objective="sft",
        checkpoint="wide",
        head=None if model else {},
        whole_load="four" in name,
    )
    for name, stages, model, more in (
        ("", range(4), {}, {}),
        ("clipped_", (2,), {}, {"max_grad_norm": 0.3}),
        ("offload_", (2, 3), {}, {"offload_optimizer": True}),
        ("bf16_", (1, 3), BF16, {}),
        ("lora_", (2,), WIDE_LORA, {}),
        ("four_bits_", (3,), {"lora": {**WIDE_LORA["lora"], "load_in_4bit": True}}, {}),
        ("none_", (0,), {}, {"optimizer": "adamw"}),
    )
    for stage in stages
}
"""Moments in eight bits, of a model with matrices that are large enough; run by test_eight_bit, which needs bitsandbytes."""
