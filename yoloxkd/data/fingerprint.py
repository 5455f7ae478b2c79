"""Fingerprint of a split, by which a resumed run recognizes its data."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import PurePath
from typing import Any

import numpy as np

from yoloxkd.data.dataset import DetectionData


def fingerprint(data: DetectionData) -> dict[str, Any]:
    """Counts, and a digest of image names and sizes, boxes, labels, what is to be ignored, and masks where they are read.

    Folders do not count, so a data set may be moved; nor do class names (a label is an index), ids or the pixels.
    Checkpoints and the kept results of studies hold it: with anything else in it, they would be taken for those of other data.
    """
    digest = hashlib.sha256()
    for path in data.paths:
        name = unicodedata.normalize("NFC", PurePath(path).name)
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    columns = (
        data.sizes.astype("<i4"),
        data.offsets.astype("<i8"),
        (np.round(data.boxes, 3) + 0.0).astype("<f8"),  # + 0.0: no negative zero
        data.labels.astype("<i8"),
        data.crowd.astype("u1"),
        *(() if data.masks is None else data.masks.columns()),
    )
    for column in columns:
        digest.update(np.ascontiguousarray(column).tobytes())
    ignored = int(data.crowd.sum())
    return {
        "images": len(data),
        "objects": len(data.crowd) - ignored,
        "ignored": ignored,
        "digest": digest.hexdigest(),
    }


def changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What is different, in words; empty where nothing is."""
    if before["digest"] == now["digest"]:
        return ""
    counts = [(f"{before[key]} {what}", f"{now[key]}") for key, what in _COUNTS if before[key] != now[key]]
    if not counts:
        return "other annotations or image files, as many as before"
    return ", ".join(f"{old}, now {new}" for old, new in counts)


_COUNTS = (("images", "images"), ("objects", "objects"), ("ignored", "boxes to ignore"))
