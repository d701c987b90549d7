"""Who samples rollouts: the training processes themselves, or a vLLM server that is given the weights of each round."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from calibtrain.config_base import Positive, Section


class RolloutEngineConfig(Section):
    """Who samples the policy's answers (docs/engines.md)."""

    kind: Literal["own", "vllm"] = "own"
    """`own`: the training processes; `vllm`: a server, which is given the policy's weights before each round."""
    address: str | None = None
    """Base URL of a vLLM server that runs already, e.g. http://127.0.0.1:8000/v1; it needs VLLM_SERVER_DEV_MODE=1."""
    launch: bool = False
    """Start a server with the run and end it with the run; its log is OUT/engine/server.log."""
    python: Path | None = None
    """Interpreter that has vLLM, for `launch`, e.g. .venv-engines/bin/python in the working directory; null: the run's."""
    arguments: tuple[str, ...] = ()
    """More options of `vllm serve`, for `launch`, e.g. [--gpu-memory-utilization, "0.9"]."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of the launched server, e.g. {CUDA_VISIBLE_DEVICES: "7"}: devices that no training process uses."""
    host: str = "127.0.0.1"
    """Where a launched server listens. Another one lets processes of other machines ask it, and whoever reaches it can
    change its weights."""
    directory: Path | None = None
    """Where weights are handed over, of this run alone, on a disk (or in memory, /dev/shm) that the server reads; null:
    OUT/engine."""
    wait: Positive = 600.0
    """Seconds that the server may be away, or take to start, before the run ends behind a checkpoint."""
    tolerance: Positive | None = None
    """Most that log-probs of server and trainer may differ by after weights are handed over, nats: the largest difference in
    fp32, the mean in bf16; null: 0.01 and 0.25."""
    overlap: bool = False
    """Sample the next round while this one is trained on: its answers are of weights one round old."""

    @model_validator(mode="after")
    def _one_server(self) -> RolloutEngineConfig:
        if self.kind == "own":
            given = [name for name in ("address", "launch", "overlap") if getattr(self, name)]
            if given:
                raise ValueError(f"{given[0]} needs kind: vllm; the training processes themselves sample in turn")
        elif (self.address is None) != self.launch:
            raise ValueError("kind: vllm needs either `address`, a server that runs, or `launch: true`")
        return self

    def tolerance_in(self, dtype: str) -> float:
        """`tolerance` with its default, for the model's dtype (bf16 or fp32)."""
        if self.tolerance is not None:
            return self.tolerance
        return 0.01 if dtype == "fp32" else 0.25
