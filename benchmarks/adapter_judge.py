"""A low-rank adapter that is on only while judging, against the confidence head, on the same graded answers.

    python benchmarks/adapter_judge.py --run out --work runs/knows --json benchmarks/results/adapter_judge.json

The adapter (LoRA on every linear layer, arXiv 2406.08391) reads a question and the model's own answer once more, and a
linear map of the last state at the answer's end is added to the log-odds of the likelihood, where it starts; both learn by
the log score. A tenth of the graded answers says after which epoch to stop. The questions are those that
`knows_when.py --work runs/knows --run repeated 0 out` asked, so that the rows compare with its own; Platt's map,
certificates and intervals are that script's.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _graded_store import Graded
from _knows_candidates import SPREAD, linear
from _knows_runs import Job, questions
from _report import print_table, write_json
from knows_when import SHOWN, Run, _mapped, row

from calibtrain.calibration.scores import sigmoid
from calibtrain.config_file import load_config
from calibtrain.models.confidence_head import log_odds
from calibtrain.pipeline.evaluate import Loaded

RANK, EPOCHS, BATCH, RATE = 8, 4, 32, 2e-4
USES = ("temperature", "certification", "test")


@dataclass
class Said:
    """Questions with the model's answers as tokens, and what it gave them."""

    rows: list[list[int]]
    offset: torch.Tensor  # (N,) log-odds of the likelihood
    correct: torch.Tensor  # (N,) float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of the finished run")
    parser.add_argument("--work", type=Path, required=True, help="of knows_when.py, which asked this run already")
    parser.add_argument("--graded", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--seeds", type=int, default=1, help="adapters drawn anew on the same answers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    job = Job("repeated", 0, str(options.work.resolve()), run=str(options.run.resolve()))
    run = Run.read(job)
    if run is None or run.fuel is None:
        raise SystemExit(f"{job.folder}: ask this run with knows_when.py first (--run repeated 0 {options.run})")
    loaded = Loaded(load_config(*job.config), options.run / "model")
    records = questions(job)
    by_id = {record.id: record for some in records.values() for record in some}

    def said(graded: Graded) -> Said:
        return spoken(loaded, [by_id[name] for name in graded.ids], graded)

    told_of = {use: said(getattr(run, use)) for use in USES}
    rows = []
    for number in options.graded:
        some = run.fuel.take(np.arange(number))
        tell = linear(SPREAD)(some.inputs, some.correct, run.seed)
        head = {use: tell(getattr(run, use).inputs) for use in USES}
        base = {use: sigmoid(one) for use, one in head.items()}
        rows.append({**row(run, "head", *_mapped(run, base)), "graded": number})
        for seed in range(options.seeds):
            started = time.process_time()
            judged = judge(loaded, said(some), told_of, seed)
            used = time.process_time() - started
            for name, logits in (
                ("adapter", judged),
                ("mean of both", {use: (judged[use] + head[use]) / 2 for use in USES}),
            ):
                mapped = _mapped(run, {use: sigmoid(one) for use, one in logits.items()})
                rows.append({**row(run, name, *mapped, against=base["test"]), "graded": number, "solving": used})
                print_table("so far", [{key: one[key] for key in SHOWN if key in one} for one in rows])
                if options.json:
                    write_json(options.json, rows, {})


def spoken(loaded: Loaded, records: Sequence[Any], graded: Graded) -> Said:
    """The answers once more, as tokens: greedy ones, so those that were graded."""
    found = loaded.answer(records)
    features = found.features
    ends = torch.bincount(features.sequence_ids, minlength=len(records)).cumsum(0).tolist()
    answers = [features.targets[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]
    prompts = [list(loaded.template.prompt_ids(record)) for record in records]
    offset = log_odds(torch.from_numpy(np.asarray(graded.inputs.logprob, dtype=np.float64))).float()
    correct = torch.from_numpy(graded.correct.astype(np.float32))
    return Said([[*one, *two] for one, two in zip(prompts, answers, strict=True)], offset, correct)


class Judge(torch.nn.Module):
    """Log-odds of an answer: a times those of its likelihood, b, and a linear map of the state at its end."""

    def __init__(self, model: Any, width: int) -> None:
        super().__init__()
        self.model, self.end = model, torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.end.weight)
        torch.nn.init.zeros_(self.end.bias)
        self.slope = torch.nn.Parameter(torch.ones(()))

    def forward(self, rows: Sequence[Sequence[int]], offset: torch.Tensor) -> torch.Tensor:
        """Log-odds (N,) of answers as tokens with their questions before them; `offset` (N,) those of the likelihood."""
        lengths = torch.tensor([len(one) for one in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for place, one in enumerate(rows):
            tokens[place, : len(one)] = torch.tensor(one)
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        states = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        last = states[torch.arange(len(rows)), lengths - 1].float()
        last = last / last.square().mean(-1, keepdim=True).sqrt()
        return self.slope * offset + self.end(last)[:, 0]


def judge(loaded: Loaded, some: Said, others: dict[str, Said], seed: int) -> dict[str, np.ndarray]:
    """Log-odds of the other answers by an adapter that learnt from `some`; the model is left as it was."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    backbone = loaded.model.policy.model.get_decoder()
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.05, target_modules="all-linear")
    adapted = get_peft_model(backbone, settings)
    net = Judge(adapted, backbone.config.hidden_size)
    adapters = [one for name, one in net.named_parameters() if "lora_" in name]
    groups = [{"params": adapters}, {"params": [net.end.weight, net.end.bias, net.slope], "lr": 5 * RATE}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.01)
    order = torch.randperm(len(some.rows))
    held, fit = order[: len(order) // 10], order[len(order) // 10 :]
    steps = EPOCHS * math.ceil(len(fit) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / (0.1 * steps)) * max(0.0, 1 - step / steps)
    )
    best, kept = math.inf, others
    result: dict[str, np.ndarray] = {}
    for epoch in range(EPOCHS):
        net.train()
        for batch in fit[torch.randperm(len(fit))].split(BATCH):
            told = net([some.rows[one] for one in batch.tolist()], some.offset[batch])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(told, some.correct[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapters, 1.0)
            optimizer.step()
            schedule.step()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(read(net, some, held), some.correct[held])
        print(f"{len(some.rows)} answers, epoch {epoch + 1}: log loss {float(loss):.4f} held out", flush=True)
        if float(loss) < best:
            best = float(loss)
            result = {use: read(net, one, torch.arange(len(one.rows))).double().numpy() for use, one in kept.items()}
    adapted.unload()
    return result


def read(net: Judge, said: Said, rows: torch.Tensor) -> torch.Tensor:
    """Log-odds of the answers at `rows`."""
    net.eval()
    with torch.no_grad():
        parts = [net([said.rows[one] for one in some.tolist()], said.offset[some]) for some in rows.split(128)]
    return torch.cat(parts)


if __name__ == "__main__":
    main()
