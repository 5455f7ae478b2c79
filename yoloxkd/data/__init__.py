"""Data sets: readers of annotation formats, augmentation, loaders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from yoloxkd.data.coco import read_coco
from yoloxkd.data.records import DetectionData

Reader = Callable[[Path, Path, list[str], str], DetectionData]
"""Reader of one split: (images folder, annotation file, class names, split name) -> DetectionData."""

FORMATS: dict[str, Reader] = {
    "coco": read_coco,
}
