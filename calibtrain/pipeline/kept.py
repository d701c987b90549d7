"""Certificates that a run keeps beside the one that serves: none of them outlives the audit that it rests on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from calibtrain.abstention.certificate import Certification
from calibtrain.confidence.scorer import HEAD
from calibtrain.errors import UserError
from calibtrain.pipeline.audit import FILE, digest_of, read_audit
from calibtrain.pipeline.calibration_file import (
    LIKELIHOOD,
    Calibrated,
    claims,
    read_calibration,
    source_folder,
    write_json,
)

RENEWED = (LIKELIHOOD, HEAD)
"""Sources whose scores stand in the files of answers: `certify` makes their certificates anew without the model."""


def kept_sources(output_dir: Path) -> list[str]:
    """Sources of the run's confidence that have a calibration, the likelihood first."""
    own = [LIKELIHOOD] if (output_dir / "calibration.json").is_file() else []
    return own + sorted(path.parent.name for path in (output_dir / "sources").glob("*/calibration.json"))


def refuted(output_dir: Path, before: Calibrated) -> bool:
    """Whether it rests on an audit that is another one now. UserError for an audit that cannot be read."""
    return before.audit is not None and before.audit.get("digest") != digest_of(read_audit(output_dir / FILE))


def withdraw(output_dir: Path, sources: list[str]) -> None:
    """Take back, of these sources, what rests on an audit that is another one now, and tell of it."""
    for source in sources:
        try:
            before = read_calibration(output_dir, source=source)
        except UserError:  # nobody can be served by it as it is
            continue
        if not before.promised or not refuted(output_dir, before):
            continue
        again = f"calibtrain calibrate {output_dir} --source {source}"
        command = f"calibtrain certify {output_dir}" if source in RENEWED else again
        none = Certification(None, f"{output_dir / FILE} has changed since it was certified; run `{command}`")
        empty = replace(
            before,
            certification=none,
            curve=dict.fromkeys(before.curve, none),
            hallucination=None,
            groups=None,
            prediction_sets=None,
            claims={},
            audit=None,
        )
        path = source_folder(output_dir, source) / "calibration.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, content | claims(empty))
        print(f"withdrawn: {path}: the audit has changed; `{command}` certifies it anew")
