"""calibtrain: fine-tune language models so that they know when they are guessing.

import calibtrain

reply = calibtrain.load("out").answer("In which country is the city of Lyon?")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibtrain.pipeline.answer import Answerer

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    output_dir: str | Path,
    source: str | None = None,
    *,
    uncertified: bool = False,
    engine: str | None = None,
    engine_model: str | None = None,
) -> Answerer:
    """Load a finished run, to be asked by `.answer(question)`. Raises UserError when its calibration does not fit it.

    source: of the confidence; any that `calibtrain calibrate OUT --source ...` calibrated, by default the one that
    `calibtrain calibrate OUT` chose: the run's confidence head or the likelihood. uncertified: where no threshold
    is certified, answer everything instead of nothing. engine: address of an OpenAI-compatible server that answers in the
    model's place, as `calibtrain calibrate OUT --engine ...` certified it; engine_model: the model's id there.
    """
    from calibtrain.pipeline.answer import load as load_run  # imports torch: not for those who take a loss alone

    return load_run(output_dir, source, uncertified=uncertified, engine=engine, engine_model=engine_model)
