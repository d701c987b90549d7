"""README.md of a pushed model: what it was made of, what was measured and certified of it, and how it is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from calibtrain.abstention.certificate import Certificate
from calibtrain.config import RunConfig
from calibtrain.pipeline.calibration_file import Calibrated
from calibtrain.pipeline.report_numbers import Stage
from calibtrain.pipeline.scope import at_least, at_most, plain

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(
    config: RunConfig,
    repo: str,
    stages: Sequence[Stage] = (),
    calibrated: Calibrated | None = None,
    *,
    adapter: bool = False,
) -> str:
    """The card as text. stages: measured on the test questions, before to after; what was not measured is not in it."""
    lines = [*_front_matter(config, adapter=adapter), "", f"# {plain(repo.rpartition('/')[2])}", ""]
    what = "LoRA adapter for" if adapter else "model fine-tuned from"
    lines.append(
        f"A {what} `{start_of(config)}` with the objective `{config.objective.name}`, by calibtrain, so that its confidence "
        "means what it says."
    )
    if config.model.lora is not None and config.model.lora.load_in_4bit and not adapter:
        lines.append(
            "It was trained on a base in four bits (QLoRA): these weights are the unpacked base with the adapter merged "
            "into it, the very ones that were measured."
        )
    if adapter:
        lines += ["", "Measured and certified was the merged model, not this adapter.", "", *_adapter_use(config, repo)]
        return "\n".join(lines) + "\n"
    lines += ["", "## Measured", "", *(_table(stages) if stages else ["Nothing was measured of this model."])]
    lines += ["", "## Certified", "", *_certified(calibrated), "", *_use(repo, calibrated)]
    return "\n".join(lines) + "\n"


def start_of(config: RunConfig) -> str:
    """The base by its name on the hub; of a directory its last part, which tells nobody's paths."""
    source = config.model.source
    return source if HUB_NAME.fullmatch(source) or source.startswith("embedded:") else plain(Path(source).name)


def _front_matter(config: RunConfig, *, adapter: bool) -> list[str]:
    named = HUB_NAME.fullmatch(config.model.source)
    base = [f"base_model: {json.dumps(config.model.source)}"] if named else []
    library = "peft" if adapter else "transformers"
    tags = ["calibtrain", "calibration", *(["lora"] if adapter else [])]
    return [
        "---",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        *base,
        f"tags: {json.dumps(tags)}",
        "---",
    ]


def _table(stages: Sequence[Stage]) -> list[str]:
    from calibtrain.calibration import metrics, ranking

    found = [f"On {stages[-1].n:,} held-out questions of the run's test split:", ""]
    found += ["| | accuracy | mean confidence | ECE (15 bins) | Brier | AUROC |", "|---|---|---|---|---|---|"]
    for one in stages:
        ranked = float(ranking.auroc(one.state))
        cells = [
            f"{one.accuracy:.1%}",
            f"{one.mean_confidence:.1%}",
            f"{float(metrics.ece(one.state)):.3f}",
            f"{float(metrics.brier(one.state)):.3f}",
            "none" if ranked != ranked else f"{ranked:.3f}",  # all right, or all wrong
        ]
        found.append(f"| {one.label} | {' | '.join(cells)} |")
    return found


def _certified(calibrated: Calibrated | None) -> list[str]:
    if calibrated is None:
        return ["Nothing is certified of this model: it was not calibrated."]
    certificate, claim = calibrated.certification.certificate, calibrated.claim
    if claim is not None:
        sure = "on average" if claim.delta is None else f"with {at_least(1 - claim.delta)} confidence"
        return [
            f"It withholds claims below a probability of {claim.threshold:.3f}: of its replies at most "
            f"{at_most(claim.target_risk)} hold a wrong claim ({sure}). It then keeps {claim.share:.1%} of its claims."
        ]
    if certificate is None:
        return [f"No threshold is certified: {plain(calibrated.certification.reason, 300)}."]
    return [_promise(certificate, calibrated)]


def _promise(certificate: Certificate, calibrated: Calibrated) -> str:
    about = f"the {calibrated.scope.n:,} graded ones from {calibrated.scope.source}"
    return (
        f"Of the answers that it gives at a calibrated confidence of {certificate.threshold:.3f} or more, at most "
        f"{at_most(certificate.target_risk)} are wrong (with {at_least(1 - certificate.delta)} confidence), for questions "
        f"like {about}. It then answers {certificate.coverage:.1%} of them and abstains from the others."
    )


def _adapter_use(config: RunConfig, repo: str) -> list[str]:
    start, bf16 = start_of(config), config.model.dtype == "bf16"
    if start.startswith("embedded:"):  # not on the hub: calibtrain brings it
        code = [
            "from peft import PeftModel",
            "",
            "from calibtrain.config import ModelConfig",
            "from calibtrain.models.loading import load_model",
            "",
            f'base = load_model(ModelConfig(source="{start}", dtype="{config.model.dtype}"))',
        ]
    elif config.model.lora is not None and config.model.lora.load_in_4bit:
        dtype = f"torch.{'bfloat16' if bf16 else 'float32'}"
        code = [
            "import torch",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, BitsAndBytesConfig",
            "",
            "four_bits = BitsAndBytesConfig(",
            '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,',
            f"    bnb_4bit_compute_dtype={dtype},",
            ")",
            f'base = AutoModelForCausalLM.from_pretrained("{start}", quantization_config=four_bits, dtype={dtype})',
        ]
    else:
        code = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{start}")',
        ]
    code.append(f'model = PeftModel.from_pretrained(base, "{repo}")')
    return ["## Load", "", "```python", *code, "```"]


def _use(repo: str, calibrated: Calibrated | None) -> list[str]:
    plainly = [
        "## Load",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{repo}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
        "```",
    ]
    if calibrated is None:
        return plainly
    return [
        *plainly,
        "",
        "## Ask, with its calibrated probability, or an abstention",
        "",
        "```bash",
        "pip install calibtrain",
        f"hf download {repo} --local-dir answering/model",
        "mv answering/model/calibtrain/* answering/",
        'calibtrain answer answering "Your question?"',
        "```",
        "",
        "The calibration holds for these very weights and this template; `calibtrain` refuses others.",
    ]
