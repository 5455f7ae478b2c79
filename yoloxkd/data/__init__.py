"""Data sets: readers of annotation formats, augmentation, loaders."""

from __future__ import annotations

from yoloxkd.data.formats.coco import COCO
from yoloxkd.data.formats.crowdhuman import CROWDHUMAN
from yoloxkd.data.formats.format import Format
from yoloxkd.data.formats.voc import VOC
from yoloxkd.data.formats.yolo import YOLO

FORMATS: dict[str, Format] = {
    "coco": COCO,
    "yolo": YOLO,
    "voc": VOC,
    "crowdhuman": CROWDHUMAN,
}
