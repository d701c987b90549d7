"""Who generates, if not our own loop: servers behind an address, with the log-probs that confidence is made of."""

from calibtrain.engines.completions import CompletionsServer
from calibtrain.engines.engine import Completion, Engine
from calibtrain.engines.identity import Identity, identify

__all__ = ["Completion", "CompletionsServer", "Engine", "Identity", "identify"]
