"""Weight penalties in a DeepSpeed run: a step on the fp32 masters, where they lie, before the optimiser's.

The step hangs on the optimiser that DeepSpeed wraps, which runs only when gradients were
finite and before it copies masters into weights: a skipped step skips the penalty, and the weights follow at no cost.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from calibtrain.config import RunConfig, WeightPenaltyConfig
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.losses.rotation_probes import Shard, penalty_norm
from calibtrain.losses.rotation_step import DecoupledPenalty, DenseMatrix, LoRAMatrix
from calibtrain.losses.silence import PATIENCE
from calibtrain.training.engine import Engine
from calibtrain.training.matrices import Reduce, begin, trained_layers

logger = logging.getLogger(__name__)


class WeightPenalties:
    """All penalties of a run. `arm` before the engine's step, `values` after it."""

    def __init__(self, penalties: Mapping[str, DecoupledPenalty], optimizer: torch.optim.Optimizer) -> None:
        self.penalties = penalties
        self._armed: int | None = None
        self._still = dict.fromkeys(penalties, 0)  # steps in a row in which the weights stood where they began
        self._values: dict[str, float] = {}
        optimizer.register_step_pre_hook(self._before_update)

    def arm(self, step: int) -> None:
        """Take the penalties' step number `step` in the coming update."""
        self._armed, self._values = step, {}

    def values(self) -> dict[str, float]:
        """Each penalty's estimate in the last update, the same on every rank; nothing when it was skipped."""
        self._armed = None
        return self._values

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._armed is None:  # ZeRO-3 calls the optimiser once for each of its groups
            return
        if all(one.grad is None for group in optimizer.param_groups for one in group["params"]):
            return  # ZeRO-0 has dropped gradients that were not finite
        step, self._armed = self._armed, None
        rate = float(optimizer.param_groups[0]["lr"])
        self._values = {name: float(one.step(step, rate)) for name, one in self.penalties.items()}
        for name, value in self._values.items():
            within = name == "angle_budget" and self.penalties[name].budget > 0
            self._still[name] = 0 if value or within else self._still[name] + 1
            if self._still[name] == PATIENCE and (not dist.is_initialized() or dist.get_rank() == 0):
                logger.warning(
                    "weight_penalties.%s has been exactly 0 for %d steps: the matrices it holds do not move; look at "
                    "what is trained, and at training.learning_rate",
                    name,
                    PATIENCE,
                )


def build_weight_penalties(config: RunConfig, engine: Engine, world: World) -> WeightPenalties | None:
    """Penalties that hold the engine's weights near what they are now: call it before a checkpoint is loaded. Collective."""
    if not config.weight_penalties:
        return None
    layers = trained_layers(engine.module.policy.causal_model)
    penalties: dict[str, DecoupledPenalty] = {}
    for number, penalty in enumerate(config.weight_penalties):
        chosen = penalised_layers(layers, penalty)
        matrices = [_matrix(name, layer, penalty.name, engine, world, i) for i, (name, layer) in enumerate(chosen)]
        penalties[penalty.name] = DecoupledPenalty(
            penalty.name,
            penalty.weight,
            matrices,
            probes=penalty.probes,
            layer_fraction=penalty.layer_fraction,
            scale=1.0 if penalty.scale == "fixed" else None,
            budget=penalty.budget,
            seed=config.seed + number,
            reduce=Reduce(world) if world.size > 1 else None,
            rank=world.rank,
            ranks=world.size,
        )
    return WeightPenalties(penalties, engine.deepspeed.basic_optimizer)


def penalised_layers(layers: Sequence[tuple[str, Any]], penalty: WeightPenaltyConfig) -> list[tuple[str, Any]]:
    """Those of `layers` that the penalty holds. Raises UserError for a name that is none of theirs, and without layers."""
    wanted = penalty.target_modules
    names = sorted({name.rpartition(".")[2] for name, _ in layers})
    missing = sorted(set(() if wanted == "all-linear" else wanted) - set(names))
    if missing or not layers:
        raise UserError(
            f"weight_penalties.{penalty.name}.target_modules: "
            + (f"no trained linear layer is called {', '.join(missing)}; " if missing else "")
            + (
                f"there are {', '.join(names)}"
                if names
                else "the run trains no linear layer, so that nothing can drift"
            )
        )
    return [(name, one) for name, one in layers if wanted == "all-linear" or name.rpartition(".")[2] in wanted]


def _matrix(name: str, layer: Any, penalty: str, engine: Engine, world: World, number: int) -> DenseMatrix | LoRAMatrix:
    begun = begin(layer, engine, world)
    norm, squared_norm = penalty_norm(penalty, begun.whole), float(begun.whole.square().sum())
    if not norm > 0:
        raise UserError(
            f"weight_penalties.{penalty}: {name} is 0 everywhere, and nothing relative to it can be held; leave it out of "
            "target_modules"
        )
    # In the model's dtype, in which the run began: exact, and half the memory of fp32.
    initial = begun.own.to(begun.device, begun.dtype, copy=True)
    polar = begun.polar_piece(number, world).to(begun.device) if penalty == "polar_drift" else None
    if len(begun.masters) == 1:
        return DenseMatrix(name, begun.masters[0], initial, norm, squared_norm, polar)
    reference = Shard(begun.shape, begun.start, initial if polar is None else polar)
    return LoRAMatrix(name, *begun.masters, reference, layer.scaling["default"], norm, squared_norm)
