"""Answers a second of who samples rollouts: the training process itself, vLLM behind an address, and TRL's GRPOTrainer.

    python benchmarks/rollout_engines.py --python .venv-engines/bin/python --json PATH

All draw as many answers to the same questions in each round, in turn, on one machine; the first round warms up. vLLM is
launched as `rollouts.engine.launch` launches it, and gets moved weights before each round; `vllm_with_push` counts the time
of handing them over and proving them, `vllm` does not. TRL draws by GRPOTrainer (transformers, its default) and by the
client by which it asks vLLM, of the same server: TRL 1.16 hands weights over by NCCL alone, so that on a CPU its trainer
itself has no vLLM. Without TRL installed its rows say so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _report import write_json
from _trl_rollouts import client_arm, trainer_arm

from calibtrain.confidence.answering import Answerer
from calibtrain.config import RunConfig
from calibtrain.data.encode import fit_prompt
from calibtrain.data.templates import template_of
from calibtrain.distributed import World
from calibtrain.engines import Completion, Draws
from calibtrain.models.loading import load_model, load_tokenizer
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.pipeline.prepare import prepare
from calibtrain.training.own_sampling import OwnSampling
from calibtrain.training.served_sampling import ServedSampling

WORLD = World(0, 1, 0, torch.device("cpu"))
Arm = Callable[[int], tuple[int, int]]
"""Round -> answers and tokens that it drew."""


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(options, Path(folder))
        template = template_of(config, load_tokenizer(config.model))
        model = LossModel(Policy(load_model(config.model))).eval()
        answerer = Answerer(model, template, config.evaluation, WORLD)
        records = prepare(config).splits["train"][: options.questions]
        prompts = [tuple(fit_prompt(one, template, 256)[0]) for one in records]
        texts = [
            (*prompt, *template.tokenizer.encode(one.accepted[0])) for prompt, one in zip(prompts, records, strict=True)
        ]
        own = OwnSampling(answerer)
        served = ServedSampling(config, answerer, texts[:4], prompts[:4])

        def draws(number: int) -> Draws:
            seeds = [1000 * (number * len(prompts) + i) for i in range(len(prompts))]
            return Draws(prompts, seeds, options.group, template.stop_ids, options.tokens, template.goes_on)

        def push(number: int) -> float:
            move(model, number)
            served.push(number)
            return served.metrics["push_seconds"]

        arms: dict[str, Arm] = {
            "own": lambda number: counted(own.sample(draws(number), number)),
            "vllm": lambda number: counted(served.sample(draws(number), number)),
        }
        trl = importlib.util.find_spec("trl") is not None
        try:
            push(-1)  # the server starts
            if trl:
                asked = draws(0)
                arms["trl_transformers"] = trainer_arm(model.policy.causal_model, template.tokenizer, asked)
                arms["trl_vllm"] = client_arm(served.server.root.url, str(served.server.model), asked)
            report = measured(arms, push, options.rounds)
        finally:
            served.close()
    report |= {"engine_gap": served.metrics["engine_gap"], "trl": "measured" if trl else "not installed (make peers)"}
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("json", "python")}
    rows = [{"sampler": name, **one} for name, one in report.pop("arms").items()]
    print(json.dumps([*rows, report], indent=2))
    if options.json:
        write_json(options.json, rows, {**report, "settings": settings})


def measured(arms: dict[str, Arm], push: Callable[[int], float], rounds: int) -> dict[str, Any]:
    """Answers and tokens a second of each arm in every round, and ratios to `own` within rounds."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in [*arms, "vllm_with_push"]}
    pushed = []
    for number in range(rounds + 1):
        seconds = push(number)
        pushed += [seconds] * (number > 0)
        for name in list(arms) if number % 2 else list(arms)[::-1]:
            began = time.perf_counter()
            answers, tokens = arms[name](number)
            took = time.perf_counter() - began
            if number:
                rates[name].append((answers / took, tokens / took))
            if number and name == "vllm":
                rates["vllm_with_push"].append((answers / (took + seconds), tokens / (took + seconds)))
    found = {name: summary(one, rates["own"]) for name, one in rates.items()}
    return {"arms": found, "push_seconds": statistics.median(pushed)}


def summary(found: list[tuple[float, float]], own: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [mine[0] / its[0] for mine, its in zip(found, own, strict=True)]
    return {
        "answers_per_second": statistics.median(one[0] for one in found),
        "tokens_per_second": statistics.median(one[1] for one in found),
        "ratio_to_own": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "rounds": [one[0] for one in found],
    }


def counted(groups: list[list[Completion]]) -> tuple[int, int]:
    return sum(map(len, groups)), sum(len(one.tokens) for group in groups for one in group)


@torch.no_grad()
def move(model: torch.nn.Module, number: int) -> None:
    """As a step of training would, a little."""
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter += 1e-5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def run_config(options: argparse.Namespace, folder: Path) -> RunConfig:
    environment = {
        "OMP_NUM_THREADS": str(options.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    limits = ["--enforce-eager", "--max-num-seqs", str(options.batch)]
    engine = {"kind": "vllm", "launch": True, "python": options.python, "arguments": limits, "environment": environment}
    return RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": options.model, "dtype": "fp32"},
            "data": {"source": {"kind": "geography"}, "max_length": 256 + options.tokens},
            "objective": {"name": "grpo"},
            "rollouts": {"group_size": options.group, "engine": engine},
            "evaluation": {"max_new_tokens": options.tokens, "batch_size": options.batch},
        }
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct", help="as model.source")
    parser.add_argument("--python", default=".venv-engines/bin/python", help="interpreter that has vLLM")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--group", type=int, default=8, help="answers to each question")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--batch", type=int, default=128, help="answers at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
