"""What a confidence means, and when nothing is said: the calibrator, and the threshold with its certificate."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from calibtrain.config_base import Risk, Section


class CalibrationConfig(Section):
    """The map from the model's likelihood to the probability of being right (docs/calibrators.md)."""

    method: Literal[
        "temperature",
        "platt",
        "beta",
        "isotonic",
        "histogram",
        "domain_temperature",
        "adaptive_temperature",
        "base_alignment",
        "vector_scaling",
        "matrix_scaling",
    ] = "temperature"
    """What is fitted on the temperature split; the last two read the log-probs of all options of a question."""
    domain: str | None = None
    """With `domain_temperature`: the stratum of a question that is its domain, e.g. `continent`."""

    @model_validator(mode="after")
    def _domains_need_a_name(self) -> CalibrationConfig:
        if (self.method == "domain_temperature") != (self.domain is not None):
            raise ValueError("method: domain_temperature and `domain`, a stratum's name, go together")
        return self


class AbstentionConfig(Section):
    """The answer/abstain threshold and its certificate."""

    target_risk: Risk = 0.2
    """Largest share of wrong answers among the answered ones."""
    delta: Risk = 0.05
    """Chance that the certificate is wrong."""
    target_hallucination: Risk | None = None
    """Also control wrong answers as a share of all questions, by conformal risk control."""
    groups: str | None = None
    """Also certify a threshold for every value of this stratum, e.g. `continent`, which together hold at delta."""
    set_error: Risk = 0.1
    """Where answers are chosen among options: share of the questions whose prediction set may miss the right one."""
    set_score: Literal["lac", "aps"] = "lac"
    """`lac`: the smallest sets; `aps`: larger ones, which follow more closely how hard a question is."""
    words: Literal["icd203", "ipcc", "nato", "phia"] = "icd203"
    """Scale of the words for probabilities."""
    report_risks: tuple[Risk, ...] = (0.05, 0.1, 0.2, 0.3)
    """Risks at which the report states the coverage."""
    outside: Literal["tell", "abstain", "ignore"] = "tell"
    """A question unlike the graded ones: say that nothing is certified for it, or do not answer it, or do not look. With
    `abstain` the certificate is for those that are like them alone."""
