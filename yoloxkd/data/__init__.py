"""Data sets: readers of annotation formats, augmentation, loaders."""

from __future__ import annotations

from yoloxkd.data.coco import COCO
from yoloxkd.data.crowdhuman import CROWDHUMAN
from yoloxkd.data.formats import Format
from yoloxkd.data.voc import VOC
from yoloxkd.data.yolo import YOLO

FORMATS: dict[str, Format] = {
    "coco": COCO,
    "yolo": YOLO,
    "voc": VOC,
    "crowdhuman": CROWDHUMAN,
}
