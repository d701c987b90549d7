"""Puts the repository root on the path, so that tests may import `tests.tiny` from wherever pytest is started.

No test fails by the clock of a busy machine: Hypothesis would ask for 200 ms an example.
"""

import sys
from pathlib import Path

from hypothesis import settings

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
