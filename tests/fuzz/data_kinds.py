"""Data sets whose files are sound YAML, JSON, XML or text with something wrong inside."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from tests.fuzz.harness import Target, is_sentence
from yoloxkd.data.check import check_data
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.problems import Faults
from yoloxkd.data.sufficiency import refuse_shortage, shortages
from yoloxkd.errors import UserError

WIDTH, HEIGHT = 64, 48
COCO = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [3, 4, 20, 10], "area": 200, "iscrowd": 0, "ignore": 0},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [5, 6, 20, 10], "segmentation": [[5, 6, 25, 6, 25, 16]]},
        {"id": 3, "image_id": 2, "category_id": 1, "bbox": [5, 6, 20, 30], "vbox": [5, 6, 9, 9], "hbox": [5, 6, 2, 2]},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}
ODGT = [
    {"ID": str(i), "gtboxes": [{"tag": "person", "fbox": [3, 4, 20, 10], "vbox": [3, 4, 9, 9], "extra": {"ignore": 0}}]}
    for i in (1, 2)
]
BOX = {"xmin": "3", "ymin": "4", "xmax": "20", "ymax": "30"}
VOC = {"size": {"width": "64", "height": "48"}, "object": {"name": "cat", "difficult": "0", "bndbox": BOX}}
LABELS = [[0, 0.5, 0.5, 0.25, 0.25], [1, 0.2, 0.2, 0.6, 0.2, 0.4, 0.6], [0, 0.5, 0.5, 0.2, 0.2]]
POSES = [[0, 0.5, 0.5, 0.25, 0.25, 0.4, 0.4, 2], [1, 0.5, 0.5, 0.2, 0.2, 0.5, 0.5, 0]]
ULTRALYTICS = {"names": {0: "cat", 1: "dog"}, "nc": 2, "path": ".", "train": "images", "val": ["images"]}
OURS = {"names": ["cat", "dog"], "path": ".", "format": "coco", "train": {"images": "images", "annotations": "a.json"}}


@functools.cache
def images() -> dict[str, bytes]:
    """Two files, by name."""
    pictures = {f"{i}.png": np.full((HEIGHT, WIDTH, 3), 100 + i, np.uint8) for i in (1, 2)}
    return {name: cv2.imencode(".png", picture)[1].tobytes() for name, picture in pictures.items()}


def use_data(write: Callable[[Any, Path], object], value: Any, folder: Path) -> None:
    """Read a data set as a training does, and check it as `data check` does."""
    for name in ("images", "labels", "xml"):
        (folder / name).mkdir()
    for name, content in images().items():
        (folder / "images" / name).write_bytes(content)
    write(value, folder)
    refused = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            _read(folder / "set.yaml")
        except UserError as error:
            refused = error
        for report in check_data(find_data(folder / "set.yaml")):  # gathers, where a training is refused
            json.dumps(report.as_dict(), allow_nan=False)
            assert not report.faults or is_sentence(report.faults.describe()[:1000]), report.faults.describe()
    if refused:
        raise refused


def _read(file: Path) -> None:
    spec = find_data(file)
    data = load_split(spec, spec.splits[0], Faults())
    said: list[str] = []
    refuse_shortage(shortages(data, imgsz=WIDTH), said.append)
    assert all(is_sentence(line) for line in said), said
    json.dumps(data.ground_truth(), allow_nan=False)
    assert data.summary().isprintable()
    assert len(data.own_image_ids()) == len(data) == len(data.sizes)
    assert len(data.categories()) == len(set(data.categories())) == len(data.names)
    assert np.isfinite(data.boxes).all()
    assert (data.areas > 0).all()


def write_coco(value: Any, folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(value))
    (folder / "set.yaml").write_text(yaml.safe_dump(OURS))


def write_odgt(value: Any, folder: Path) -> None:
    rows = value if isinstance(value, list) else [value]
    (folder / "a.odgt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "set.yaml").write_text("train: {images: images, annotations: a.odgt}")


def write_voc(value: Any, folder: Path) -> None:
    (folder / "xml" / "1.xml").write_text(_xml("annotation", value).replace("\0", "&#0;"))
    (folder / "set.yaml").write_text("names: [cat, dog]\ntrain: {images: images, annotations: xml}")


def _xml(tag: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"<{tag}>{''.join(_xml(str(key), item) for key, item in value.items())}</{tag}>"
    if isinstance(value, list):
        return "".join(_xml(tag, item) for item in value) or f"<{tag}/>"
    return f"<{tag}>{value}</{tag}>"


def write_labels(value: Any, folder: Path, keys: str = "") -> None:
    rows = value if isinstance(value, list) else [value]
    lines = (" ".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows)
    (folder / "labels" / "1.txt").write_text("\n".join(lines))
    (folder / "set.yaml").write_text(f"names: [cat, dog]\ntrain: images\n{keys}")


def write_yaml(value: Any, folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(COCO))
    write_labels(LABELS, folder)
    (folder / "set.yaml").write_text(yaml.safe_dump(value, allow_unicode=True))


def _kind(base: Any, write: Callable[[Any, Path], object]) -> Target:
    return Target(lambda: base, functools.partial(use_data, write))


DATA: dict[str, Target] = {
    "data.yaml": _kind(ULTRALYTICS, write_yaml),
    "our data.yaml": _kind(OURS, write_yaml),
    "coco.json": _kind(COCO, write_coco),
    "crowdhuman.odgt": _kind(ODGT, write_odgt),
    "voc.xml": _kind(VOC, write_voc),
    "yolo labels": _kind(LABELS, write_labels),
    "yolo poses": _kind(POSES, functools.partial(write_labels, keys="kpt_shape: [1, 3]")),
}
