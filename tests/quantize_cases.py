"""A tiny calibrated run to quantise, and a quantiser that only adds noise, for tests of what stands around the real one."""

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from calibtrain.config_file import load_config
from calibtrain.data.sources import load_records
from calibtrain.pipeline import calibrate, quantize, quantize_table
from calibtrain.pipeline.evaluate import Loaded
from calibtrain.pipeline.quantize_source import Asked
from calibtrain.quantization.schemes import scheme_of
from calibtrain.tasks.matching import normalize
from tests.distributed.jobs import write_job
from tests.tiny import write_tiny_model

SPLITS = {"train": 10, "calibration": 24, "temperature": 30, "certification": 60, "test": 40}
QUESTIONS = 900


def noised(source, target, texts, settings, *, on_block):
    """Stands for `quantize_directory`: a directory whose matrices are a little off."""
    partial = Path(f"{target}.partial")
    shutil.copytree(source, partial)
    for file in partial.glob("*.safetensors"):
        generator = torch.Generator().manual_seed(0)
        found = load_file(file)
        for name, one in found.items():
            if one.ndim == 2 and "layers" in name:
                found[name] = one + 0.01 * one.std() * torch.randn(one.shape, generator=generator)
        save_file(found, file, {"format": "pt"})
    on_block(1, 2)
    on_block(2, 2)
    partial.rename(target)
    return {"label": settings.scheme.label, "samples": len(texts), "full_precision": ["lm_head"], "seconds": 0.1}


__all__ = ["Asked", "calibrate", "quantize"]


def asked(**changes):
    """What a command with the default options asks for, where the tiny model can give it."""
    return Asked(**{"scheme": scheme_of("w4a16", group_size=32), "method": "minmax", "samples": 16, **changes})


def tiny_run(folder, target_risk=0.5):
    """A run that is right where it is surest, four times in five, with answers, calibrator and certificate."""
    job = write_job(folder, data={"splits": SPLITS}, evaluation={"batch_size": 64, "max_new_tokens": 3})
    job.write_text(job.read_text() + f"abstention: {{target_risk: {target_risk}, delta: 0.1}}\n")
    rows = [{"question": f"What is {i}?", "answers": ["unknown"]} for i in range(QUESTIONS)]
    write_rows(folder / "questions.jsonl", rows)
    config = load_config(job)
    write_tiny_model(config.output_dir / "model", tied=False, hidden=64, initializer_range=0.2)
    shutil.copy(job, config.output_dir / "config.yaml")
    said = Loaded(config, config.output_dir / "model").answer(load_records(config.data.source, config.seed)).answers
    said = sorted((one for one in said if normalize(one.text)), key=lambda one: one.confidence)
    wrong = {one.question for one in said[: len(said) // 5]}
    rows = [
        {"question": one.question, "answers": [f"never <i>{i}</i>" if one.question in wrong else one.text]}
        for i, one in enumerate(said)
    ]
    write_rows(folder / "questions.jsonl", rows)
    calibrate.run(config.output_dir)
    return config.output_dir


def few_resamples(patch):
    """What many of them give is tested with the table."""
    patch.setattr(quantize, "compare", partial(quantize.compare, replicates=2))
    patch.setattr(quantize_table, "CERTIFICATE_REPLICATES", 2)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
