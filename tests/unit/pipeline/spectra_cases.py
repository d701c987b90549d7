"""Contents of spectra.json as the analysis writes it, made up: for the page's tests, and to look at the page."""

import math
import random

from calibtrain.pipeline.spectra import without_nan
from calibtrain.spectral.null import NULLS, TESTS
from calibtrain.spectral.verdict import findings, summary

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def spectra(layers=30, modules=ATTENTION + MLP, experts=0, side=576, seed=0, absent=()):
    """A whole file. `experts` of them replace every MLP module; `absent` are (layer, module) that the model lacks."""
    draw = random.Random(seed)
    rows = []
    for layer in range(layers):
        for module in modules:
            if (layer, module) in absent:
                continue
            if experts and module in MLP:
                rows += [row(draw, layer, f"experts.{module}", side, expert) for expert in range(experts)]
            else:
                rows.append(row(draw, layer, module, side))
    return whole(rows)


def whole(rows, base="HuggingFaceTB/SmolLM2-135M", tuned="out/model", **changes):
    """The file around its rows, with the words that go with them."""
    total = summary(rows)
    content = {
        "format": 1,
        "base": base,
        "tuned": tuned,
        "tuned_hash": "0" * 64,
        "settings": {"null_seeds": 5, "rank": None, "seed": 0, "level": 0.05, "layers": None, "modules": None},
        "matrices": rows,
        "left_out": [{"name": "model.embed_tokens.weight", "why": "an embedding; --modules embed_tokens asks for it"}],
        "summary": total,
        "findings": findings(total, 0.05),
        "seconds": 41.2,
        "peak_gb": 1.1,
    }
    return without_nan(content | changes)


def row(draw, layer, module, side=576, expert=None, name=None):
    """One matrix whose numbers agree with each other as far as the page can tell."""
    part = "self_attn" if module in ATTENTION else "mlp"
    drift = 0.006 + 0.012 * draw.random() * (1.8 if module == "o_proj" else 1.0) + 0.0002 * (layer or 0)
    level, spread = draw.gauss(0.002 if module == "o_proj" else -0.0004, 0.0008), drift * draw.uniform(0.2, 0.6)
    rank, points = side, min(side, 64)
    index = [round(i * (rank - 1) / max(points - 1, 1)) for i in range(points)]
    before = [20.0 * (1 + i) ** -0.55 * math.exp(-1.2 * i / rank) for i in index]
    after = [s * (1 + level + draw.gauss(0, spread)) for s in before]
    scale, shared = abs(level) * 3, draw.uniform(0.4, 0.6)
    rest = 1 - scale - shared
    null = draw.uniform(0.02, 0.03)
    beyond = {"scale": abs(level) > 0.002, "shared_rotation": draw.random() < 0.7, "uniform_scaling": False}
    values = {"scale": level, "shared_rotation": draw.uniform(0.3, 0.5), "uniform_scaling": draw.uniform(0.0, 0.01)}
    name = name or f"model.layers.{layer}.{part}.{module}.weight" + ("" if expert is None else f"[{expert}]")
    return {
        "name": name,
        "layer": layer,
        "module": module,
        "expert": expert,
        "shape": [side, side],
        "dtype": "bfloat16",
        "rank": rank,
        "basis_error": 0.0,
        "kind": "shared rotation" if beyond["shared_rotation"] else draw.choice(["noise", "mixed"]),
        "squared_norm": side * 30.0,
        "relative_drift": drift,
        "rounding_share": draw.uniform(0.01, 0.1),
        "update_rank": rank // 2,
        "scale": {"alpha": 1 + level, "median": 1 + level, "spread": spread, "slope": draw.gauss(0, 0.001)},
        "spectrum": {"change": 0.01, "before": before, "after": after, "index": index},
        "spectral_norm_ratio": after[0] / before[0],
        "stable_rank": [18.2, 18.4],
        "angles": {
            "left": draw.uniform(2, 6),
            "right": draw.uniform(2, 6),
            "shared": draw.uniform(1, 5),
            "subspaces": [{"k": 8, "left": 9.1, "right": 8.7}],
        },
        "consistency": {
            "nf": null * draw.uniform(0.5, 1.1), "null": null, "null_low": null * 0.97, "null_high": null * 1.03,
        },
        "drift": dict.fromkeys(
            ("row_gram_drift", "column_gram_drift", "polar_drift", "row_stretch", "column_stretch"), drift**2
        ),
        "shares": {
            "scale": scale,
            "shared_rotation": shared,
            "rest": rest,
            "of_rest": {"spectrum": rest * 0.01, "unshared_rotation": rest * 0.79, "outside": rest * 0.2},
        },
        "tests": {test: tested(values[test], beyond[test]) for test in TESTS},
    }  # fmt: skip


def tested(value, beyond):
    """A test with its three nulls."""
    null = {"mean": 0.5, "low": 0.48, "high": 0.52, "p": 0.001 if beyond else 0.4}
    return {
        "value": value,
        "nulls": {name: dict(null) for name in NULLS},
        "p": null["p"],
        "q": 0.004 if beyond else 0.5,
        "beyond": beyond,
    }


def unchanged(draw, layer, module):
    """A matrix that training left as it was: nothing to test, nothing to rotate."""
    found = row(draw, layer, module)
    nothing = {"value": math.nan, "nulls": {}, "p": math.nan, "q": math.nan, "beyond": False}
    return found | {
        "kind": "unchanged",
        "relative_drift": 0.0,
        "rounding_share": 0.0,
        "update_rank": 0,
        "scale": {"alpha": 1.0, "median": 1.0, "spread": 0.0, "slope": math.nan},
        "spectrum": {**found["spectrum"], "after": found["spectrum"]["before"]},
        "angles": {"left": 0.0, "right": 0.0, "shared": math.nan, "subspaces": []},
        "consistency": dict.fromkeys(("nf", "null", "null_low", "null_high"), math.nan),
        "shares": None,
        "tests": dict.fromkeys(TESTS, nothing),
    }


def small():
    """SmolLM2-135M's shape."""
    return spectra()


def large():
    """80 layers of 7 modules, as 70B."""
    return spectra(layers=80, side=8192, seed=1)


def experts():
    """24 layers, the first without experts, 32 of them in each other."""
    absent = {(0, module) for module in MLP}
    return spectra(layers=24, experts=32, side=1024, seed=2, absent=absent)


def with_nulls():
    """Some matrices unchanged, one test that could not be made, a module that only two layers have, a head."""
    draw = random.Random(3)
    rows = [row(draw, layer, module) for layer in range(6) for module in ("q_proj", "o_proj")]
    rows += [unchanged(draw, layer, "router") for layer in (2, 4)]
    rows[4]["spectrum"]["after"][0] = math.nan
    rows.append(row(draw, None, "lm_head", name="lm_head.weight"))
    content = whole(rows)
    content["matrices"][3]["tests"]["scale"] = None
    return content


def hostile():
    """Names that want to be markup, and one that is very long."""
    draw = random.Random(4)
    rows = [row(draw, layer, HOSTILE, name=f"{HOSTILE}{layer}") for layer in range(3)]
    rows.append(row(draw, 1, "x" * 300, name="model." + "y" * 400))
    return whole(
        [one | {"kind": HOSTILE, "dtype": HOSTILE} for one in rows],
        base=HOSTILE,
        tuned="a b/" + "z" * 300,
        left_out=[{"name": HOSTILE, "why": HOSTILE}],
        findings=[{"claim": HOSTILE, "beyond": True, "text": HOSTILE}],
        settings={HOSTILE: HOSTILE},
    )


def empty():
    """Everything was left out."""
    summary = {"matrices": 0, "tests": {}, "kinds": {}}
    return whole([], summary=summary, findings=[])
