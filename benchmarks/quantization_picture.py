"""What bits cost in confidence, as the picture of docs/quantization.md, from what benchmarks/quantization.py wrote.

python benchmarks/quantization_picture.py benchmarks/results/quantization.json docs/images/quantization.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

WIDTH, ROW, LEFT, MIDDLE, RIGHT, TOP = 760, 24, 232, 440, 500, 66
SCHEMES = ("w8a16", "fp8", "w8a8", "w4a16")
STYLE = """
svg { font: 13px system-ui, sans-serif; background: #fff; } text { fill: #222; } .note { fill: #666; }
.ours { fill: #2a6fb0; } .peer { fill: #fff; stroke: #8a8a8a; } .line { stroke: #ccc; } .range { stroke: #444; }
@media (prefers-color-scheme: dark) { svg { background: #16181c; } text { fill: #e4e4e4; } .note { fill: #a0a0a0; }
.ours { fill: #6aa9e0; } .peer { fill: #16181c; stroke: #9a9a9a; } .line { stroke: #444; } .range { stroke: #ccc; } }
"""


def drawn(rows: list[dict[str, Any]]) -> str:
    """An SVG: share of answers that are others, and AUROC's difference with its 95 % interval, a line for each row."""
    chosen = [one for scheme in SCHEMES for one in rows if one["model"] == "tuned" and one["scheme"] == scheme]
    height = TOP + ROW * len(chosen) + 24
    widest = max(one["changed_answers"] for one in chosen) / 1000
    reach = max(max(-one["auroc_delta_low"], one["auroc_delta_high"]) for one in chosen)
    bar = lambda share: (MIDDLE - LEFT) * share / widest  # noqa: E731
    place = lambda delta: (RIGHT + WIDTH - 16) / 2 + delta / reach * (WIDTH - 16 - RIGHT) / 2  # noqa: E731
    parts = [
        f'<text x="{LEFT}" y="20">answers that are others</text>',
        f'<text x="{place(0)}" y="20" text-anchor="middle">AUROC, difference and 95 % interval</text>',
        f'<rect class="ours" x="{LEFT}" y="34" width="22" height="10"/>'
        f'<text class="note" x="{LEFT + 28}" y="43">calibtrain</text>'
        f'<rect class="peer" x="{LEFT + 108}" y="34" width="22" height="10"/>'
        f'<text class="note" x="{LEFT + 136}" y="43">llm-compressor</text>',
        f'<path class="line" d="M{place(0)},{TOP - 10}V{height - 24}"/>',
        f'<text class="note" x="{place(0)}" y="{height - 8}" text-anchor="middle">0</text>',
    ]
    parts += [
        f'<text class="note" x="{place(end):.1f}" y="{height - 8}" text-anchor="middle">{end:+.2f}</text>'
        for end in (-0.04, 0.02)
        if abs(end) <= reach
    ]
    for number, one in enumerate(chosen):
        y, share = TOP + ROW * number, one["changed_answers"] / 1000
        kind = "ours" if one["tool"] == "calibtrain" else "peer"
        low, high, middle = (place(one[f"auroc_delta{end}"]) for end in ("_low", "_high", ""))
        name = one["method"].replace("-rotated", " --rotate")
        first = number == 0 or chosen[number - 1]["scheme"] != one["scheme"]
        if first:
            parts.append(
                f'<path class="line" d="M8,{y - 10}H{WIDTH - 8}"/><text x="12" y="{y + 5}">{one["scheme"]}</text>'
            )
        parts.append(
            f'<text x="{LEFT - 10}" y="{y + 5}" text-anchor="end">{name}</text>'
            f'<rect class="{kind}" x="{LEFT}" y="{y - 6}" width="{bar(share):.1f}" height="13"/>'
            f'<text class="note" x="{LEFT + bar(share) + 6:.1f}" y="{y + 5}">{share:.1%}</text>'
            f'<path class="range" d="M{low:.1f},{y}H{high:.1f}"/>'
            f'<circle class="{kind}" cx="{middle:.1f}" cy="{y}" r="4"/>'
        )
    title = "What bits cost: answers that changed and the order of confidences, by scheme and method"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">'
        f"<title>{title}</title><style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("svg", type=Path)
    options = parser.parse_args()
    rows = json.loads(options.json.read_text(encoding="utf-8"))["rows"]
    options.svg.write_text(drawn(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
