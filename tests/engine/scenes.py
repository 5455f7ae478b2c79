"""A small data set of colored rectangles, written to disk."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from yoloxkd.data.dataset import DetectionData

COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 220, 30)}


def scene(
    folder: Path,
    images: int = 4,
    size: tuple[int, int] = (90, 120),
    names: tuple[str, ...] = ("red", "blue"),
    seed: int = 0,
) -> DetectionData:
    """Images of (height, width) = `size`, each with two rectangles, one of them a crowd region in every third image."""
    rng = np.random.default_rng(seed)
    height, width = size
    paths, boxes, labels = [], [], []
    for i in range(images):
        picture = rng.integers(90, 140, (height, width, 3), dtype=np.uint8)
        for _ in range(2):
            w, h = int(rng.integers(width // 6, width // 2)), int(rng.integers(height // 6, height // 2))
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            label = int(rng.integers(len(names)))
            picture[y : y + h, x : x + w] = COLORS[names[label]]
            boxes.append([x, y, x + w, y + h])
            labels.append(label)
        path = folder / f"{i}.png"
        cv2.imwrite(str(path), picture[..., ::-1])
        paths.append(str(path))
    corners = np.array(boxes, np.float32)
    return DetectionData(
        names=list(names),
        split="val",
        image_ids=np.arange(images, dtype=np.int64) * 3 + 7,
        paths=paths,
        sizes=np.tile(np.array([[height, width]], np.int32), (images, 1)),
        boxes=corners,
        labels=np.array(labels, np.int64),
        crowd=np.arange(len(labels)) % 6 == 5,
        areas=(corners[:, 2:] - corners[:, :2]).prod(1).astype(np.float64),
        annotation_ids=np.arange(1, len(labels) + 1, dtype=np.int64),
        offsets=np.arange(0, 2 * images + 1, 2, dtype=np.int64),
    )
