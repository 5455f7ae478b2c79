"""Calibration images for int8: a data set or a plain folder."""

from __future__ import annotations

import numpy as np

from yoloxkd.cache_folders import expand
from yoloxkd.data.augment.transforms import letterbox
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.io.find_images import images_of
from yoloxkd.data.io.images import read_image
from yoloxkd.errors import UserError


def calibration_images(source: str, imgsz: int, pad_value: tuple[int, int, int], count: int) -> list[np.ndarray]:
    """At most `count` images (1, 3, imgsz, imgsz) uint8 RGB, letterboxed, evenly spread over what `source` holds.

    source: a folder of images (with all below it), or a data set (YAML or name), of which the train split is taken,
    else the first it has. UserError: there is no image.
    """
    paths = _paths(source)
    indices = np.unique(np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)).tolist()
    return [
        np.ascontiguousarray(letterbox(read_image(paths[i])[0], (imgsz, imgsz), pad_value)[0].transpose(2, 0, 1)[None])
        for i in indices
    ]


def _paths(source: str) -> list[str]:
    folder = expand(source)
    if folder.is_dir():
        try:
            return images_of([folder], folder)
        except UserError as error:
            raise UserError(f"--calib {source} holds no image to calibrate int8 on; give a folder that does") from error
    spec = find_data(source)
    split = "train" if "train" in spec.splits else spec.splits[0]
    paths = list(load_split(spec, split).paths)
    if not paths:
        raise UserError(f"the {split} split of {source} holds no image to calibrate int8 on")
    return paths
