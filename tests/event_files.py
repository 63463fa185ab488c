"""Reads back what TensorBoard would."""

from __future__ import annotations

import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event


def events(folder: Path) -> dict[str, dict[int, Any]]:
    """The values of each tag by step: a number, a picture, a histogram, or what a plugin keeps."""
    found: dict[str, dict[int, Any]] = defaultdict(dict)
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                found[value.tag][event.step] = getattr(value, kind) if kind else value.metadata.plugin_data.content
    return dict(found)
