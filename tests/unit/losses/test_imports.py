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
