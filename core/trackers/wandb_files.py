"""Reads how far an offline file of W&B got: its library writes these, has no reader for them, and loses what it has
not written when it is killed.

The file is a LevelDB log (github.com/google/leveldb, doc/log_format.md) with a header of 7 bytes, of protocol buffers
`wandb.proto.wandb_internal_pb2.Record`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILE_HEADER = b":W&B"
_FILE_HEADER_BYTES = 7
_BLOCK = 32768
_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def last_step_in(file: Path) -> int | None:
    """The newest step whose numbers are in the file; None: none."""
    from wandb.proto import wandb_internal_pb2

    newest: int | None = None
    for raw in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        if record.WhichOneof("record_type") == "history" and (step := _step(record.history)) is not None:
            newest = step if newest is None else max(newest, step)
    return newest


def records(content: bytes) -> Iterator[bytes]:
    """The whole records of a file; it may end anywhere."""
    if not content.startswith(_FILE_HEADER):
        return
    position, parts = _FILE_HEADER_BYTES, b""
    while position + _HEADER.size <= len(content):
        if _BLOCK - position % _BLOCK < _HEADER.size:  # the rest of a block is padding
            position += _BLOCK - position % _BLOCK
            continue
        _, size, kind = _HEADER.unpack_from(content, position)
        position += _HEADER.size
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or position + size > len(content):
            return
        parts = content[position : position + size] if kind in (_FULL, _FIRST) else parts + content[position:][:size]
        position += size
        if kind in (_FULL, _LAST):
            yield parts


def _step(history: Any) -> int | None:
    for item in history.item:
        if "_step" in (item.key, *item.nested_key):
            return int(json.loads(item.value_json))
    return None
