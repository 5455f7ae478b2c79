"""A small data set of colored rectangles in YOLO format, which the examples train on."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

COLORS = {"red": (20, 20, 220), "blue": (220, 60, 20), "green": (40, 190, 40)}  # BGR
SIZE = 96  # px


def write_data(folder: Path, names: list[str], images: int = 24) -> Path:
    """Write images/, labels/ and data.yaml, with objects of these classes; return the YAML.

    A label file has a line an object: class number, then center x, center y, width and height as fractions of the image.
    """
    random = np.random.default_rng(0)
    for split, count in (("train", images), ("val", max(4, images // 4))):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = random.integers(100, 140, (SIZE, SIZE, 3), dtype=np.uint8)
            lines = []
            for _ in range(random.integers(1, 4)):
                label = int(random.integers(len(names)))
                w, h = (int(v) for v in random.integers(16, 48, 2))
                x, y = int(random.integers(SIZE - w)), int(random.integers(SIZE - h))
                image[y : y + h, x : x + w] = COLORS[names[label]]
                lines.append(f"{label} {(x + w / 2) / SIZE} {(y + h / 2) / SIZE} {w / SIZE} {h / SIZE}")
            cv2.imwrite(str(folder / "images" / split / f"{number}.png"), image)
            (folder / "labels" / split / f"{number}.txt").write_text("\n".join(lines) + "\n")
    file = folder / "data.yaml"
    file.write_text(f"path: .\nnames: [{', '.join(names)}]\ntrain: images/train\nval: images/val\n")
    return file


SHORT = {
    "augment.multiscale": 0,
    "augment.mosaic": 0.0,
    "optim.lr_per_image": 1e-3,
    "engine.workers": 0,
    "val.interval": 1000,
}
"""Recipe keys of a short run on few small images: one evaluation, a high learning rate."""
