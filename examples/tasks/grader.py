"""A grader of one's own, as examples/tasks/custom.yaml names it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def within_a_factor_of_two(answer: str, record: Mapping[str, Any]) -> bool:
    """Whether the first number of an answer is at least half and at most twice the column `people`."""
    digits = re.search(r"\d[\d,. ]*", answer)
    if digits is None:
        return False
    said, people = int(re.sub(r"\D", "", digits[0])), int(record["fields"]["people"])
    return people <= 2 * said and said <= 2 * people
