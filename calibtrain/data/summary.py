"""What a set of records is, for the report and the certificate."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from calibtrain.records import Record


def data_hash(records: Sequence[Record]) -> str:
    """SHA-256 over the records' ids and contents, whatever their order. 64 hex digits."""
    digests = sorted(
        hashlib.sha256(
            json.dumps(
                [
                    record.id,
                    [[message.role, message.content] for message in record.prompt],
                    record.chosen,
                    record.rejected,
                    list(record.accepted),
                    *([list(record.options)] if record.options else []),
                    *_more(record),
                ],
                ensure_ascii=True,
            ).encode()
        ).hexdigest()
        for record in records
    )
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _more(record: Record) -> list[Any]:
    """What few records have, so that it leaves the others' hash as it was: tools, calls, a weight, turns left out."""
    called = [[i, *astuple(call)] for i, turn in enumerate(record.turns) for call in turn.tool_calls]
    answers = [i - len(record.turns) for i, turn in enumerate(record.turns) if turn.role == "assistant"]
    hushed = [place for place in answers if record.learned and place not in record.learned]
    found = [record.tools, called, record.weight, hushed]
    return found if found != ["", [], 1.0, []] else []


def describe(records: Sequence[Record]) -> dict[str, Any]:
    """Plain values for JSON: n, how many are pairs and graded, the share of each stratum, the data hash."""
    keys = sorted({key for record in records for key in record.strata})
    strata = {}
    for key in keys:
        counts = Counter(record.strata.get(key, "unknown") for record in records)
        strata[key] = {
            name: count / len(records) for name, count in sorted(counts.items(), key=lambda i: (-i[1], i[0]))
        }
    return {
        "n": len(records),
        "pairs": sum(None not in (record.chosen, record.rejected) for record in records),
        "graded": sum(bool(record.accepted) for record in records),
        "strata": strata,
        "data_hash": data_hash(records),
    }
