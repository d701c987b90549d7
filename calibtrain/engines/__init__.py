"""Who generates, if not our own loop: servers behind an address, with the log-probs that confidence is made of."""

from calibtrain.engines.completions import CompletionsServer
from calibtrain.engines.engine import Completion, Draws, Engine, SamplingEngine
from calibtrain.engines.identity import Identity, identify
from calibtrain.engines.launched import LaunchedServer, interpreter
from calibtrain.engines.vllm import VLLMServer

__all__ = [
    "Completion",
    "CompletionsServer",
    "Draws",
    "Engine",
    "Identity",
    "LaunchedServer",
    "SamplingEngine",
    "VLLMServer",
    "identify",
    "interpreter",
]
