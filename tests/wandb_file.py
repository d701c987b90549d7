"""Reads what the W&B SDK wrote for an offline run."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: LevelDB's log format (blocks of 32 KiB, header of checksum, length, type) after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while offset + HEADER <= len(data):
        if BLOCK - offset % BLOCK < HEADER:
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        whole += data[offset + HEADER : offset + HEADER + length]
        offset += HEADER + length
        if kind in (1, 4):  # full, last
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def history(path: Path) -> list[dict[str, Any]]:
    """Logged rows, in the order they were written."""
    rows = [r.history for r in records(path) if r.WhichOneof("record_type") == "history"]
    return [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in row.item} for row in rows]
