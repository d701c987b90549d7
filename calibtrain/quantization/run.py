"""A model directory quantised block by block: fold, round, hand on what the rounded block makes, write."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, ExitStack
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibtrain.errors import UserError
from calibtrain.quantization.affine import QuantizedWeight, quantize_tokens, quantize_weight
from calibtrain.quantization.blocks import (
    Inputs,
    Text,
    first_inputs,
    matrices_in,
    matrix_of,
    observe,
    run_block,
    stages_of,
)
from calibtrain.quantization.schemes import Scheme, fit_groups, is_ignored
from calibtrain.quantization.streaming import StreamedModel
