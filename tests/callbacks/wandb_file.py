"""What W&B wrote of a run that is offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, one dict a call. Only after ``wandb.teardown()`` is all of it there."""
    from wandb.proto.wandb_internal_pb2 import Record

    entries = []
    for raw in _records(path):
        record = Record.FromString(raw)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            entries.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return entries


def _records(path: Path) -> Iterator[bytes]:
    """Of a run's file: LevelDB's log format, blocks of 32 KiB, behind a header of 7 bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its end
            yield whole
            whole = b""
