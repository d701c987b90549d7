"""calibration.json: what was fitted and certified, of which weights, template and questions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calibtrain.abstention.certificate import Certificate, Certification
from calibtrain.abstention.claims import ClaimsCertificate, ClaimsCertification
from calibtrain.abstention.groups import GroupCertification
from calibtrain.abstention.hallucination import HallucinationCertificate
from calibtrain.abstention.judged import JudgedCertificate
from calibtrain.abstention.prediction_sets import PredictionSets
from calibtrain.abstention.strata import GroupRisk
from calibtrain.abstention.words import scale_of
from calibtrain.calibration.calibrators import Calibrator
from calibtrain.calibration.parts import PartCalibrators
from calibtrain.config import ModelConfig, RunConfig
from calibtrain.config_file import load_config
from calibtrain.errors import UserError
from calibtrain.pipeline.own_code import config_of_run
from calibtrain.pipeline.question import Shapes
from calibtrain.pipeline.scope import Scope
from calibtrain.tasks.kinds import task_of

LIKELIHOOD = "likelihood"


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What `calibration.json` holds."""

    calibrator: Calibrator
    certification: Certification
    curve: dict[float, Certification]
    scope: Scope  # the questions that it was certified on
    hallucination: HallucinationCertificate | None = None  # where the config asks for a rate
    groups: GroupCertification | None = None  # where the config names the groups
    prediction_sets: PredictionSets | None = None  # where answers are chosen among options
    failures: tuple[str, ...] = field(default=(), compare=False)  # what was asked for in vain; not in the file
    audit: Mapping[str, Any] | None = None  # where a judge graded: what a person's audit says of it
    parts: PartCalibrators | None = None  # where answers are made of parts
    claims: dict[float, ClaimsCertification] = field(default_factory=dict)  # by risk, the asked one first
    outside: int = field(default=0, compare=False)  # held-out questions by which others are told; 0: they are not
    shapes: Shapes = field(default=Shapes(), compare=False)  # of the questions that were graded

    @property
    def promised(self) -> bool:
        """Whether anything is certified to be answered at the risk that was asked for."""
        return self.certification.certificate is not None or self.claim is not None

    @property
    def claim(self) -> ClaimsCertificate | None:
        """What is promised at the asked risk where claims are withheld."""
        return next((one.certificate for one in self.claims.values()), None)


def weights_hash(model: Path) -> str:
    """SHA-256 over weight files and config.json of a Hugging Face directory; a calibrator holds for these alone.

    config.json tells what is made of the weights (rotary base, quantisation); who wrote it, and where, does not count.
    """
    digest = hashlib.sha256()
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise UserError(f"{model}: no safetensors weights")
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    if (model / "config.json").is_file():
        settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in settings.items() if key not in ("transformers_version", "_name_or_path")}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()


def made_by(weights: str, template: str) -> str:
    """Mark of the model and template that gave an answer, for its line in a file."""
    return hashlib.sha256(f"{weights} {template}".encode()).hexdigest()[:16]


def made_by_source(model: ModelConfig) -> str:
    """Mark of the model that a run starts from, for its answers' lines: nothing is ever certified by these."""
    return hashlib.sha256(f"starts from {model.source} {model.revision}".encode()).hexdigest()[:16]


def source_folder(output_dir: Path, source: str | None) -> Path:
    """Where the calibration of a source lies: beside the model for the likelihood, which None stands for too."""
    return output_dir if source in (None, LIKELIHOOD) else output_dir / "sources" / source


def served_source(output_dir: Path) -> str:
    """The source of a run's confidence where none is named: what its calibration.json says, else the likelihood.

    `confidence_head.serves: never` in config.yaml holds at once, whatever was calibrated before.
    """
    try:
        content = json.loads((output_dir / "calibration.json").read_text(encoding="utf-8"))
        found = str(content.get("serves", LIKELIHOOD))
        head = load_config(output_dir / "config.yaml").confidence_head
    except (OSError, ValueError, AttributeError, UserError):
        return LIKELIHOOD  # what is wrong is told by whoever reads it
    return LIKELIHOOD if head is not None and head.serves == "never" else found


def answering(config: RunConfig) -> dict[str, Any]:
    """Settings by which answers and their scores come about: with others the calibration says nothing."""
    task = task_of(config.task)
    return {
        "data.template": config.data.template,
        "evaluation.max_new_tokens": config.evaluation.max_new_tokens,
        "calibration.domain": config.calibration.domain,
        "evaluation.stop": list(config.evaluation.stop),
        "task": task.identity(),
        "code of the task": task.code(),
    }


def file_hash(path: Path) -> str:
    """SHA-256 of a file; "" where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def parts_hashes(output_dir: Path, parts: Iterable[str]) -> dict[str, str]:
    """Hashes of files (relative to the run) that a source's scores rest on."""
    return {part: file_hash(output_dir / part) for part in parts}


def write_calibration(
    path: Path,
    calibrated: Calibrated,
    config: RunConfig,
    data_hashes: dict[str, str],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """calibration.json: calibrator, certificate (or why there is none), certified curve, word scale, and `facts`."""
    content = {
        "source": LIKELIHOOD,
        "parts": {},
        **(facts or {}),
        "calibrator": calibrated.calibrator.as_dict(),
        "answer_parts": calibrated.parts and calibrated.parts.as_dict(),
        **claims(calibrated),
        "answering": answering(config),
        "data_hashes": data_hashes,
        "words": [asdict(word) for word in scale_of(config.abstention.words)],
    }
    write_json(path, content)


def claims(calibrated: Calibrated) -> dict[str, Any]:
    """What calibration.json says of certificates."""
    main, groups = _certification(calibrated.certification), calibrated.groups
    return {
        "scope": calibrated.scope.as_dict(),
        "certificate": main["certificate"],
        "certification": main["reason"],
        "exceptions": main["exceptions"],
        "curve": [{"target_risk": risk, **_certification(one)} for risk, one in sorted(calibrated.curve.items())],
        "hallucination": calibrated.hallucination and calibrated.hallucination.as_dict(),
        "claims": [{"target_risk": risk, **one.as_dict()} for risk, one in calibrated.claims.items()],
        "groups": groups
        and {
            "by": groups.by,
            "delta": groups.delta,
            "share": groups.share,
            "groups": {name: _certification(one) for name, one in groups.groups.items()},
        },
        "prediction_sets": calibrated.prediction_sets and calibrated.prediction_sets.as_dict(),
        "audit": calibrated.audit,
    }


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(partial, path)


def read_calibration(output_dir: Path, *, template_hash: str | None = None, source: str | None = None) -> Calibrated:
    """Calibration of a run, or of one of its sources.

    UserError when there is none, when it cannot be read whole, or when it is of other weights, another template, another
    source or other settings than the run has now.
    """
    path = source_folder(output_dir, source) / "calibration.json"
    command = f"calibtrain calibrate {output_dir}" + ("" if path.parent == output_dir else f" --source {source}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `{command}`")
    config = config_of_run(output_dir)  # what its task is may be a function that config.yaml names
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fitted = content["calibrator"]
        calibrator = Calibrator.from_dict(
            fitted,
            template_hash=fitted["template_hash"] if template_hash is None else template_hash,
            weights_hash=weights_hash(output_dir / "model"),
        )
        if difference := changed(content, config, output_dir, source or LIKELIHOOD):
            raise UserError(f"{difference}; run `{command}` again")
        return calibrated_of(content, calibrator)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}); run `{command}` again") from error


def calibrated_of(content: Mapping[str, Any], calibrator: Calibrator) -> Calibrated:
    """What the content of calibration.json says, beside its calibrator. KeyError or TypeError where it is not whole."""
    hallucination, groups = content["hallucination"], content["groups"]
    sets = content.get("prediction_sets")  # files of earlier versions have none
    parts = content.get("answer_parts")  # earlier versions knew none
    main = {"reason": content["certification"], **{key: content[key] for key in ("certificate", "exceptions")}}
    return Calibrated(
        calibrator,
        _read_certification(main),
        {one["target_risk"]: _read_certification(one) for one in content["curve"]},
        Scope.from_dict(content["scope"]),
        hallucination and HallucinationCertificate.from_dict(hallucination),
        groups
        and GroupCertification(
            {name: _read_certification(one) for name, one in groups["groups"].items()},
            groups["delta"],
            groups["share"],
            groups["by"],
        ),
        prediction_sets=sets and PredictionSets.from_dict(sets),
        parts=parts
        and PartCalibrators.from_dict(
            parts, template_hash=calibrator.template_hash, weights_hash=calibrator.weights_hash
        ),
        claims={one["target_risk"]: ClaimsCertification.from_dict(one) for one in content.get("claims", ())},
        audit=content.get("audit"),
        outside=int((content.get("outside") or {}).get("n", 0)),
        shapes=Shapes.from_dict(content.get("shapes") or {}),
    )


def changed(content: Mapping[str, Any], config: RunConfig, output_dir: Path, source: str) -> str | None:
    """What is no longer as it was when the calibration was made."""
    if content["source"] != source:
        return f"it is of the source {content['source']!r}, not of {source!r}"
    for key, value in answering(config).items():
        # A file of an earlier version does not say what could not be set then.
        if content["answering"].get(key, value) != value:
            return f"{key} in config.yaml was {content['answering'][key]!r} then and is {value!r} now"
    parts: dict[str, str] = content["parts"]
    now = parts_hashes(output_dir, parts)
    return next((f"{output_dir / part} has changed since" for part, known in parts.items() if now[part] != known), None)


def _certification(found: Certification) -> dict[str, Any]:
    certificate, exceptions = found.certificate, [one.as_dict() for one in found.exceptions]
    return {"reason": found.reason, "certificate": certificate and certificate.as_dict(), "exceptions": exceptions}


def _read_certification(values: dict[str, Any]) -> Certification:
    certificate = values["certificate"]
    return Certification(
        None if certificate is None else _read_certificate(certificate),
        str(values["reason"]),
        tuple(GroupRisk.from_dict(one) for one in values["exceptions"]),
    )


def _read_certificate(values: dict[str, Any]) -> Certificate:
    """The one by right grades, or the one by a judge's with an audit."""
    kind = JudgedCertificate if "n_audited" in values else Certificate
    return kind.from_dict(values)
