"""Output files of `yoloxkd predict`: JSON rows, COCO results, YOLO text, videos with boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yoloxkd.instance_masks import as_one_polygon, mask_polygons, rle_dict, segment_line
from yoloxkd.nn.coco_names import COCO_NAMES
from yoloxkd.types import Detections

_UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_COCO_IDS = [i for i in range(1, 91) if i not in _UNUSED_COCO_IDS]


@dataclass(frozen=True, slots=True)
class ImageResult:
    """Detections of an image (h, w), or of frame `frame` (0, 1, ...) of a video."""

    source: str
    frame: int | None
    size: tuple[int, int]
    detections: Detections

    @property
    def stem(self) -> str:
        return Path(self.source).stem + ("" if self.frame is None else f"_{self.frame:06d}")

    def row(self) -> dict[str, Any]:
        """As `--json` writes it."""
        frame = {} if self.frame is None else {"frame": self.frame}
        return {"image": self.source, **frame, "detections": self.detections.as_dicts()}


def coco_rows(result: ImageResult) -> list[dict[str, Any]]:
    """COCO's result format, a row a detection: image_id, category_id, bbox x y w h px, score; file_name and frame besides; with
    masks also segmentation, as run lengths.

    category_id is COCO's for its 80 classes, else the label + 1; image_id is 0 until `numbered` knows it.
    """
    names = list(result.detections.names)
    ids = _COCO_IDS if names == list(COCO_NAMES) else list(range(1, len(names) + 1))
    frame = {} if result.frame is None else {"frame": result.frame}
    rows = []
    for detection in result.detections:
        x1, y1, x2, y2 = detection.box.tolist()
        mask = {} if detection.mask is None else {"segmentation": rle_dict(detection.mask)}
        rows.append(
            {
                "image_id": 0,
                "category_id": ids[detection.label],
                "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
                "score": round(detection.score, 6),
                **mask,
                "file_name": result.source,
                **frame,
            }
        )
    return rows


def numbered(stems: Sequence[str], rows_of_images: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of all images with their image_id.

    It is the number in the file's name where every one is a number and no two are the same (as COCO's are), else the
    image's place in the list from 1 on.
    """
    numbers = [int(stem) if stem.isdecimal() else None for stem in stems]
    by_name = None not in numbers and len(set(numbers)) == len(numbers)
    places = numbers if by_name else range(1, len(stems) + 1)
    return [row | {"image_id": place} for place, rows in zip(places, rows_of_images, strict=True) for row in rows]


def yolo_text(result: ImageResult, scores: bool = False) -> str:
    """A line a detection: label, center x, center y, width, height as parts of the image; with `scores` its score too.

    With masks a line is YOLO's segment instead: label, and the points of the mask's outline as parts of the image.
    """
    height, width = result.size
    detections = result.detections
    lines = []
    if detections.masks is not None:
        for one in detections:
            x1, y1, x2, y2 = one.box.tolist()
            parts = mask_polygons(one.mask) if one.mask is not None else []
            polygon = as_one_polygon(parts or [np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])])
            line = segment_line(one.label, polygon, height, width)
            lines.append(f"{line[:-1]} {one.score:.6f}\n" if scores else line)
        return "".join(lines)
    for (x1, y1, x2, y2), score, label in zip(
        detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True
    ):
        numbers = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        numbers += (score,) if scores else ()
        lines.append(" ".join([str(label), *(f"{v:.6f}" for v in numbers)]) + "\n")
    return "".join(lines)
