"""The report's figures of rollouts that a proxy rewards: did right answers rise with the reward?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from calibtrain.pipeline.figures import Axes, Chart, Curve, curves, nice_ceiling

PREFIX = "train/rollouts/"
HEIGHT = 220


def reward_figures(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """(title, figure): the proxy and the share of right answers by step, and by KL where that was measured."""
    logged = [line for line in lines if line.get("event") == "log" and line.get(PREFIX + "proxy") is not None]
    found = []
    for key, title, unit in (
        ("proxy", "What the answers earn", "mean reward"),
        ("correct", "Right answers among those sampled", "share right"),
    ):
        for by, label in ((None, "optimiser step"), ("kl", "KL from the starting model, nats an answer")):
            points = [
                (float(line["step"] if by is None else line[PREFIX + by]), float(line[PREFIX + key]))
                for line in logged
                if line.get(PREFIX + key) is not None and (by is None or line.get(PREFIX + by) is not None)
            ]
            if len(points) < 2:
                continue
            points = sorted(points) if by else points
            name = f"{title}, by {'KL' if by else 'step'}"
            chart = Chart(name, label, unit, percent=False)
            line = Curve([x for x, _ in points], [y for _, y in points])
            found.append((name, curves([line], chart, _axes(points, key))))
    return found


def _axes(points: Sequence[tuple[float, float]], key: str) -> Axes:
    xs, ys = zip(*points, strict=True)
    left, right = min(0.0, *xs), max(xs)
    if key == "correct":
        return Axes((left, right if right > left else left + 1.0), (0.0, 1.0), height=HEIGHT)
    low = -nice_ceiling(-min(ys)) if min(ys) < 0 else 0.0
    high = nice_ceiling(max(ys)) if max(ys) > 0 else float(low == 0.0)  # a proxy that is always 0 has an axis too
    return Axes((left, right if right > left else left + 1.0), (low, high), height=HEIGHT)
