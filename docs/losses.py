"""Write docs/losses.md from the catalogue and the config: `python docs/losses.py`. A test fails when it is stale."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from calibtrain.loss_list import PLACES, keys, sections
from calibtrain.losses import CATALOG, LossEntry

HEAD = """# The losses

Every method, made from the code by `python docs/losses.py`. `calibtrain losses` prints it in short.
[losses-in-your-trainer.md](losses-in-your-trainer.md) says how to use them elsewhere, and how to write your own.

## How they are computed

Every loss is a function of `TokenStats` (log-prob, entropy, sum of squared probabilities, top confidence and
correctness of each target token), made by one fused op from hidden states and the head: the logits of a batch are
never held, whatever the loss. What a loss adds is arithmetic on vectors as long as there are target tokens. Where it
reads more than that, its cost says so:

- `token_set` losses read the log-probs of a few tokens at every target: K + 1 dot products a token, K the size of the
  set.
- Penalties on own answers need answers: every `refresh_every` steps the model answers questions of the calibration
  split, they are graded, and each step takes `answers_per_step` of them into its batch, as answers or as questions
  about them. All penalties of a run share this stream.
- A frozen reference is not kept beside the model: its log-probs are computed once, before training.
- Weight penalties act on the optimiser's shards, between the gradient and the step, without a forward pass.

Losses return sums with their counts. The loop divides by counts over all ranks and micro-batches, so a gradient does
not depend on how a step is cut.

## In a config

```yaml config
objective:
  name: focal
  gamma: 3.0
penalties:
  - name: token_brier
    weight: 0.5
  - name: mmce
weight_penalties:
  - name: polar_drift
```

`objective` takes one, `penalties` and `weight_penalties` any number, each once. [configuration.md](configuration.md)
explains the keys.

"""

KINDS = {
    "objective": "Objectives",
    "penalty": "Penalties",
    "weight penalty": "Weight penalties",
    "reward": "Rewards",
    "function": "Functions",
}
NOTES = {
    "reward": "Of sampled answers; `rollouts` in the config composes them for grpo, rloo and ppo. Import them from "
    "`calibtrain.losses.rewards`. [rewards.md](rewards.md) says where training ends with each.",
    "function": "Pure functions for a rollout engine or a trainer of your own.",
}


def cell(text: str) -> str:
    """Text that a Markdown table can hold."""
    return text.replace("|", "\\|").replace("\n", " ") or "-"


def shown(value: Any) -> str:
    """A default as YAML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)


def config_keys(entry: LossEntry) -> str:
    """`key = default` of every key of the loss's section."""
    section = sections().get((entry.kind, entry.name))
    if section is None:
        return "-"
    fields = [(key, section.model_fields[key]) for key in keys(entry.kind, entry.name)]
    return ", ".join(
        f"`{key}`" + ("" if field.is_required() else f" = {shown(field.default)}") for key, field in fields
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *[[cell(text) for text in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for kind, title in KINDS.items():
        entries = [entry for entry in CATALOG if entry.kind == kind]
        parts.append(f"## {title}\n")
        if kind in NOTES:
            parts.append(NOTES[kind] + "\n")
        rows = [[f"`{one.name}`", one.title, one.paper, one.equation, one.cost] for one in entries]
        parts.append(table(["method", "what it is", "paper", "equation", "cost"], rows) + "\n")
        if kind in PLACES:
            rows = [[f"`{one.name}`", config_keys(one)] for one in entries]
            parts.append(f"Keys under `{PLACES[kind]}`, with their defaults:\n")
            parts.append(table(["method", "keys"], rows) + "\n")
    parts.append(
        "## What they were compared with\n\n"
        "The tests compare every method with this on the same tensors; where the deviation is d,\n"
        "they let |ours - theirs| <= d (1 + |theirs|) pass.\n"
    )
    rows = [[f"`{one.name}`", one.compared_with, one.largest_deviation, one.differs] for one in CATALOG]
    parts.append(
        table(["method", "reference", "largest deviation", "where it differs from the public code, and why"], rows)
        + "\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "losses.md").write_text(render(), "utf-8")
