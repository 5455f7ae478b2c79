"""COCO's mask metric: both backends alike, equal to pycocotools' own summary, on COCO's annotations and random shapes."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from yoloxkd.data.formats.coco import read_coco
from yoloxkd.errors import UserError
from yoloxkd.instance_masks import encode_rle
from yoloxkd.metrics.coco import METRIC_NAMES, COCODetections, coco_metrics
from yoloxkd.metrics.measure import larger_is_better, measure


def moved_masks(truth: dict[str, Any], seed: int, every: int = 1) -> tuple[COCODetections, list[str]]:
    """Detections that are the true masks, moved by some pixels, with random scores, and a tenth of the labels wrong."""
    rng = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    names = [category["name"] for category in truth["categories"]]
    label_of = {category["id"]: k for k, category in enumerate(truth["categories"])}
    rows = truth["annotations"][::every]
    masks = []
    for a in rows:
        h, w = sizes[a["image_id"]]
        packed = a["segmentation"]
        if isinstance(packed, list) or isinstance(packed["counts"], list):
            packed = coco.frPyObjects(packed, h, w)
        mask = coco.decode(coco.merge(packed) if isinstance(packed, list) else packed)
        shift = rng.integers(-4, 5, 2)
        masks.append(encode_rle(np.roll(mask, tuple(shift), (0, 1))))
    labels = np.array([label_of[a["category_id"]] for a in rows])
    labels = np.where(rng.random(len(rows)) < 0.1, rng.integers(0, len(names), len(rows)), labels)
    boxes = np.array([a["bbox"] for a in rows], np.float64)
    boxes[:, 2:] += boxes[:, :2]
    ids = np.array([a["image_id"] for a in rows])
    return COCODetections(ids, boxes, rng.random(len(rows)).round(2), labels, masks), names


def summary(truth: dict[str, Any], found: COCODetections) -> list[float]:
    """pycocotools' own twelve numbers."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    assert found.masks is not None
    size = {image["id"]: [image["height"], image["width"]] for image in truth["images"]}
    ids = [category["id"] for category in truth["categories"]]
    rows = [
        {"image_id": i, "category_id": ids[k], "segmentation": {"size": size[i], "counts": m}, "score": s}
        for i, k, s, m in zip(
            found.image_id.tolist(), found.labels.tolist(), found.scores.tolist(), found.masks, strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO()
        data.dataset = json.loads(json.dumps(truth))
        data.createIndex()
        reference = COCOeval(data, data.loadRes(rows), "segm")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    return [float(v) for v in reference.stats]


@pytest.mark.parametrize("split", ["train", "val"])
def test_both_backends_and_the_reader_give_pycocotools_numbers(coco_mini: Path, split: str) -> None:
    file = coco_mini / "annotations" / f"{split}_segm.json"
    truth = json.loads(file.read_text())
    found, names = moved_masks(truth, seed=1, every=3)
    wanted = summary(truth, found)
    assert 0.05 < wanted[0] < 0.9
    for backend in ("hotcoco", "pycocotools"):
        numbers = coco_metrics(truth, found, names=names, backend=backend, kind="segm")
        assert [numbers[k] for k in METRIC_NAMES] == pytest.approx(wanted, abs=1e-9)
    data = read_coco(coco_mini / "images" / split, file, names, split, masks=True)
    place = {int(image): i for i, image in enumerate(data.image_ids)}
    found.image_id = np.array([place[int(i)] for i in found.image_id])
    both = measure(data, list(range(len(data))), found, "hotcoco")
    assert [both[f"mask_{k}"] for k in METRIC_NAMES] == pytest.approx(wanted, abs=1e-9)
    assert both["AP"] == pytest.approx(coco_metrics(data.ground_truth() | {}, _named(found, data), names=names)["AP"])
    assert set(both["per_class"]["person"]) == {"AP", "AP50", "mask_AP", "mask_AP50"}
    assert not [kind for kind in data.faults.counts if "mask" in kind or "polygon" in kind]


def _named(found: COCODetections, data: Any) -> COCODetections:
    return COCODetections(data.image_ids[found.image_id], found.boxes, found.scores, found.labels)


def random_truth(seed: int) -> dict[str, Any]:
    """Polygons, run lengths of both forms, crowds."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(24):
        h, w = 120, 160
        center, radius = rng.uniform(20, 100, 2), rng.uniform(4, 50)
        angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
        points = center + radius * np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(0.4, 1, (9, 1))
        packed = coco.merge(coco.frPyObjects([points.ravel().tolist()], h, w))
        segmentation: Any = [points.ravel().tolist()]
        if number % 3 == 1:
            segmentation = {"size": [h, w], "counts": packed["counts"].decode()}
        elif number % 3 == 2:
            flat = coco.decode(packed).T.ravel()
            ends = np.flatnonzero(np.diff(flat)) + 1
            segmentation = {"size": [h, w], "counts": np.diff([0, *ends, flat.size]).tolist()}
        row = {
            "id": number + 1,
            "image_id": number % 5,
            "category_id": int(rng.integers(1, 4)),
            "segmentation": segmentation,
        }
        box = [*points.min(0).tolist(), *np.ptp(points, axis=0).tolist()]
        rows.append(row | {"bbox": box, "area": float(coco.area(packed)), "iscrowd": int(number % 7 == 1)})
    images = [{"id": i, "file_name": f"{i}.png", "height": 120, "width": 160} for i in range(5)]
    return {"images": images, "annotations": rows, "categories": [{"id": k, "name": f"c{k}"} for k in (1, 2, 3)]}


@pytest.mark.parametrize("seed", range(4))
def test_both_backends_agree_on_random_masks(seed: int) -> None:
    truth = random_truth(seed)
    found, names = moved_masks(truth, seed)
    one, other = (coco_metrics(truth, found, names=names, backend=b, kind="segm") for b in ("hotcoco", "pycocotools"))
    assert [one[k] for k in METRIC_NAMES] == pytest.approx([other[k] for k in METRIC_NAMES], abs=1e-9)
    assert [one[k] for k in METRIC_NAMES] == pytest.approx(summary(truth, found), abs=1e-9)


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_what_has_no_mask_is_a_region_to_ignore(backend: str) -> None:
    truth = random_truth(0)
    for row in truth["annotations"]:
        row["iscrowd"], row["category_id"] = 0, 1
    found, names = moved_masks(truth, 0)
    found.labels[:] = 0
    full = coco_metrics(truth, found, names=names, backend=backend, kind="segm")["AP50"]
    for row in truth["annotations"][::4]:
        del row["segmentation"]
    fewer = coco_metrics(truth, found, names=names, backend=backend, kind="segm")["AP50"]
    assert fewer > 0.5 * full
    assert coco_metrics(truth, COCODetections(masks=[]), names=names, backend=backend, kind="segm")["AP"] == 0
    with pytest.raises(UserError, match="have boxes alone"):
        coco_metrics(truth, COCODetections(), names=names, backend=backend, kind="segm")


def test_the_number_that_chooses_is_named() -> None:
    numbers = {"AP": 0.3, "mask_AP": 0.2, "MR": 0.4, "per_class": {}}
    assert larger_is_better(numbers, "mask_AP", "val.metric") == 0.2
    assert larger_is_better(numbers, "MR", "val.metric") == -0.4
    with pytest.raises(UserError, match=r"val.metric 'maskAP' is not measured here; did you mean 'mask_AP'"):
        larger_is_better(numbers, "maskAP", "val.metric")
