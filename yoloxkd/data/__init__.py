"""Data sets: annotation formats, augmentation, loaders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yoloxkd.table import Table

if TYPE_CHECKING:
    from yoloxkd.data.formats.format import Format

FORMATS: Table[Format] = Table(
    "format",
    {
        "coco": "yoloxkd.data.formats.coco:COCO",
        "yolo": "yoloxkd.data.formats.yolo:YOLO",
        "voc": "yoloxkd.data.formats.voc:VOC",
        "crowdhuman": "yoloxkd.data.formats.crowdhuman:CROWDHUMAN",
        "cityscapes": "yoloxkd.data.formats.cityscapes:CITYSCAPES",
    },
)
"""Annotation format -> its reader and writer."""
