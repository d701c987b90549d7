"""Who imports the losses into their own trainer pays for torch and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import sys, torch
before = set(sys.modules)
import calibtrain.losses
new = {name.split(".")[0] for name in set(sys.modules) - before}
import json; print(json.dumps(sorted(new - set(sys.stdlib_module_names))))
"""


def test_losses_import_torch_and_calibtrain_only():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    # torch may load more of itself; what counts is that nothing else comes with the losses.
    assert set(json.loads(result.stdout)) <= {"calibtrain", "torch"}


def test_no_heavy_package_is_imported_on_the_way():
    """Not even one that is gone again from sys.modules, or comes with another: every import is in -X importtime."""
    argv = [sys.executable, "-X", "importtime", "-c", "import calibtrain.losses"]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    names = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert {"torch", "calibtrain"} <= names
    heavy = {"deepspeed", "transformers", "wandb", "triton", "scipy", "sklearn", "pydantic", "datasets", "plotly"}
    assert not names & heavy


def test_every_public_name_is_there():
    import calibtrain.losses

    assert all(hasattr(calibtrain.losses, name) for name in calibtrain.losses.__all__)
    assert len({entry.name for entry in calibtrain.losses.CATALOG}) == len(calibtrain.losses.CATALOG)
