"""Fused ops: one public function each, importable with torch alone."""

from calibtrain.ops.answer_logprobs import answer_logprobs_at
from calibtrain.ops.stable import at_least_float32, log1mexp
from calibtrain.ops.token_set import token_set_logprobs
from calibtrain.ops.token_stats import TokenStats, fused_linear_token_stats, linear_logprobs

__all__ = [
    "TokenStats",
    "answer_logprobs_at",
    "at_least_float32",
    "fused_linear_token_stats",
    "linear_logprobs",
    "log1mexp",
    "token_set_logprobs",
]
