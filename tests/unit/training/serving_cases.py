"""A policy on one rank, for what samples from it behind an address."""

from __future__ import annotations

import torch

from calibtrain.confidence.answering import Answerer
from calibtrain.data.templates import Template
from calibtrain.distributed import World
from calibtrain.models.loading import load_model
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from tests.tiny import tiny_tokenizer

WORLD = World(0, 1, 0, torch.device("cpu"))


def answerer_of(config):
    """The answerer of a config's model, and four prompts of different lengths."""
    model = LossModel(Policy(load_model(config.model))).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(4, 380, (length,), generator=generator).tolist()) for length in (3, 7, 12, 24)]
    return Answerer(model, Template("plain", tiny_tokenizer()), config.evaluation, WORLD), prompts


@torch.no_grad()
def moved(answerer, size, seed=0):
    """Move all weights a little, as a step would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in answerer.module.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator)
