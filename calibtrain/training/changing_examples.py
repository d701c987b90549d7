"""Training examples that are made, labelled or compared anew while the model learns: the loop treats all of them alike.

Each is the sequence of the examples, is told of the coming step (`before_step`, collective), completes a collated batch
(`fill`), has the step's numbers in `metrics`, what a resume needs in `state_dict`, and ends what it started in `close`.
"""

from __future__ import annotations

from calibtrain.training.refusal_examples import RefusalExamples
from calibtrain.training.rollouts import Rollouts
from calibtrain.training.unpaired_examples import UnpairedExamples

ChangingExamples = Rollouts | RefusalExamples | UnpairedExamples
