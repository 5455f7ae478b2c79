"""Data sets whose files are sound JSON, XML, YAML or text with something wrong inside: read, or refused in one sentence.

YOLOXKD_FUZZ_TRIES sets how many of each kind are tried.
"""

from __future__ import annotations

import copy
import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from yoloxkd.data.faults import Faults
from yoloxkd.data.spec import find_data, load_split
from yoloxkd.errors import UserError

TRIES = int(os.environ.get("YOLOXKD_FUZZ_TRIES", "80"))
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    -0.0,
    0.5,
    3.0,
    1e300,
    -1e300,
    1e-300,
    10**25,
    -(10**25),
    2**53 + 1,
    2**63,
]
ODD += [-(2**63), float("nan"), float("inf"), "", " ", "0", "1", "x", "1e300", "nan", "\0", "\n", "é", "a" * 300, "~x"]
ODD += [
    [],
    [[]],
    [None],
    {},
    {"x": 1},
    [1, 2, 3],
    [1, 2, 3, 4],
    ["1", "2", "3", "4"],
    [[1, 2, 3, 4]],
    [1e300] * 4,
    [[[]]],
]
ODD += [[10**25] * 4, [True] * 4, [float("nan")] * 4, [-0.0] * 4, [0.1, 0.1, 0.2, 0.2], {"0": "a"}, {0: "a"}, [["a"]]]
COCO = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in (1, 2)],
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
LABELS = [[0, 0.5, 0.5, 0.25, 0.25], [1, 0.2, 0.2, 0.6, 0.2, 0.4, 0.6], [0, 0.5, 0.5, 0.2, 0.2, 0.9]]
YAML = {"names": {0: "cat", 1: "dog"}, "nc": 2, "path": ".", "train": "images", "val": ["images"], "kpt_shape": [2, 2]}
OURS = {"names": ["cat", "dog"], "path": ".", "format": "coco", "train": {"images": "images", "annotations": "a.json"}}


def spots(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    pairs = list(tree.items() if isinstance(tree, dict) else enumerate(tree)) if isinstance(tree, dict | list) else []
    return [spot for key, value in pairs for spot in [(tree, key), *spots(value)]]


def spoilt(tree: Any, rng: random.Random) -> Any:
    """A copy with one to three places dropped, doubled, or of another value."""
    out = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = spots(out)
        if not places:
            break
        where, key = rng.choice(places)
        how = rng.random()
        if how < 0.15:
            del where[key]
        elif how < 0.3 and isinstance(where, list):
            where.append(copy.deepcopy(where[key]))
        elif how < 0.4 and isinstance(where, dict):
            where[rng.choice(("x", "valid", "ignore", "iscrowd", "format", "test"))] = copy.deepcopy(where[key])
        else:
            where[key] = copy.deepcopy(rng.choice(ODD))
    return out


def xml(tag: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"<{tag}>{''.join(xml(str(k), v) for k, v in value.items())}</{tag}>"
    if isinstance(value, list):
        return "".join(xml(tag, one) for one in value) or f"<{tag}/>"
    return f"<{tag}>{value}</{tag}>"


def write_coco(folder: Path, rng: random.Random) -> None:
    (folder / "a.json").write_text(json.dumps(spoilt(COCO, rng)))
    (folder / "set.yaml").write_text(yaml.safe_dump(OURS))


def write_odgt(folder: Path, rng: random.Random) -> None:
    rows = [spoilt(row, rng) for row in ODGT]
    (folder / "a.odgt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "set.yaml").write_text("train: {images: images, annotations: a.odgt}")


def write_voc(folder: Path, rng: random.Random) -> None:
    (folder / "xml" / "1.xml").write_text(xml("annotation", spoilt(VOC, rng)).replace("\0", "&#0;"))
    (folder / "set.yaml").write_text("names: [cat, dog]\ntrain: {images: images, annotations: xml}")


def write_yolo(folder: Path, rng: random.Random) -> None:
    rows = spoilt(LABELS, rng)
    text = "\n".join(" ".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows)
    (folder / "labels" / "1.txt").write_text(text)
    shape = rng.choice(("", "kpt_shape: [2, 1]", "kpt_shape: [1, 2]", "kpt_shape: [1, 3]"))
    (folder / "set.yaml").write_text(f"names: [cat, dog]\ntrain: images\n{shape}")


def write_yaml(folder: Path, rng: random.Random) -> None:
    (folder / "a.json").write_text(json.dumps(COCO))
    (folder / "set.yaml").write_text(yaml.safe_dump(spoilt(rng.choice((YAML, OURS)), rng), allow_unicode=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("images", "labels", "xml"):
        (root / name).mkdir()
    for suffix in ("png", "jpg"):
        for i in (1, 2):
            assert cv2.imwrite(str(root / "images" / f"{i}.{suffix}"), np.full((48, 64, 3), 9, np.uint8))
    return root


@pytest.mark.parametrize("write", [write_coco, write_odgt, write_voc, write_yolo, write_yaml])
def test_a_value_of_another_kind_ends_in_a_reading_or_one_sentence(
    folder: Path, write: Callable[[Path, random.Random], None]
) -> None:
    read = 0
    for seed in range(TRIES):
        write(folder, random.Random(seed))
        for gather in (False, True):
            said = outcome(folder / "set.yaml", Faults(gather=gather, kept=None if gather else 5))
            assert said.isprintable(), (seed, gather, said)
            read += not said
    assert read > TRIES / 10  # not everything is refused


def outcome(file: Path, faults: Faults) -> str:
    """The sentence that the data set is refused with; nothing where it is read, and what was read makes sense."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            spec = find_data(file)
            data = load_split(spec, spec.splits[0], faults)
        except UserError as error:
            return str(error)
    json.dumps(data.ground_truth(), allow_nan=False)
    assert data.summary().isprintable()
    assert len(data.own_image_ids()) == len(data) == len(data.sizes)
    assert len(data.categories()) == len(set(data.categories())) == len(data.names)
    assert np.isfinite(data.boxes).all()
    assert (data.areas > 0).all()
    return ""
