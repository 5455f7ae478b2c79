"""The COCO numbers: both backends alike, equal to pycocotools' own summary, and known on real detections."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoloxkd.errors import UserError
from yoloxkd.metrics.coco import BACKENDS, METRIC_NAMES, COCODetections, coco_metrics

NAMES = ["red", "green", "blue"]


def scene(
    seed: int, images: int = 6, detections: int = 60, crowd: bool = True
) -> tuple[dict[str, Any], COCODetections]:
    """Random boxes of all sizes, some crowd, and detections that are moved truths, noise, and tied scores."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(images):
        for _ in range(int(rng.integers(0, 6))):
            w, h = np.exp(rng.uniform(1.5, 5.3, 2))
            x, y = rng.uniform(0, 200, 2)
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": 10 * image,
                    "category_id": int(rng.integers(1, 4)),
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "area": float(w * h * rng.uniform(0.5, 1)),
                    "iscrowd": int(crowd and rng.random() < 0.2),
                }
            )
    truth = {
        "images": [{"id": 10 * i, "file_name": f"{i}.jpg", "width": 400, "height": 400} for i in range(images)],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(NAMES)],
        "annotations": annotations,
    }
    ids, boxes, labels = [], [], []
    for _ in range(detections if annotations else 0):
        a = annotations[int(rng.integers(len(annotations)))]
        x, y, w, h = a["bbox"]
        corners = np.array([x, y, x + w, y + h]) + rng.normal(0, 0.08, 4) * np.array([w, h, w, h])
        ids.append(a["image_id"])
        boxes.append(np.concatenate([np.minimum(corners[:2], corners[2:]), np.maximum(corners[:2], corners[2:])]))
        labels.append(a["category_id"] - 1 if rng.random() < 0.8 else int(rng.integers(3)))
    found = COCODetections(
        np.array(ids, dtype=np.int64),
        np.array(boxes).reshape(-1, 4),
        np.round(rng.random(len(ids)), 1),
        np.array(labels, dtype=np.int64),
    )
    return truth, found


@given(seed=st.integers(0, 10_000), crowd=st.booleans())
@settings(max_examples=25, deadline=None)
def test_both_backends_give_the_same_numbers(seed: int, crowd: bool) -> None:
    truth, found = scene(seed, crowd=crowd)
    for number, row in enumerate(truth["annotations"]):
        row |= {"difficult": 1} if row["iscrowd"] and number % 2 else {}
    assert coco_metrics(truth, found, names=NAMES, backend="hotcoco") == coco_metrics(
        truth, found, names=NAMES, backend="pycocotools"
    )


def test_numbers_are_those_of_pycocotools_summary() -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = scene(3)
    for a in truth["annotations"]:
        a["id"] += 1
    wh = found.boxes[:, 2:] - found.boxes[:, :2]
    rows = np.column_stack([found.image_id, found.boxes[:, :2], wh, found.scores, found.labels + 1])
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO()
        data.dataset = truth
        data.createIndex()
        reference = COCOeval(data, data.loadRes(rows), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    ours = coco_metrics(truth, found, names=NAMES)
    assert [ours[k] for k in METRIC_NAMES] == pytest.approx(list(reference.stats), abs=1e-12)
    assert 0 < ours["AP"] < 1


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_no_detections_give_zero_and_what_cannot_be_measured_minus_one(backend: str) -> None:
    truth, _ = scene(1)
    for a in truth["annotations"]:
        a["area"], a["iscrowd"], a["category_id"] = 50.0, 0, 1
    numbers = coco_metrics(truth, COCODetections(), names=NAMES, backend=backend)
    assert {k: numbers[k] for k in ("AP", "AP50", "APs", "AR100", "ARs")} == dict.fromkeys(
        ("AP", "AP50", "APs", "AR100", "ARs"), 0.0
    )
    assert numbers["APm"] == numbers["APl"] == numbers["ARl"] == -1.0
    assert numbers["per_class"] == {
        "red": {"AP": 0.0, "AP50": 0.0},
        "green": {"AP": -1.0, "AP50": -1.0},
        "blue": {"AP": -1.0, "AP50": -1.0},
    }


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_no_ground_truth_at_all_cannot_be_measured(backend: str) -> None:
    truth, found = scene(1)
    numbers = coco_metrics({**truth, "annotations": []}, found, names=NAMES, backend=backend)
    assert {numbers[k] for k in METRIC_NAMES} == {-1.0}


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_perfect_detections_score_one_even_for_annotation_id_zero(backend: str) -> None:
    truth, _ = scene(2, crowd=False)
    assert truth["annotations"][0]["id"] == 0
    boxes = np.array([a["bbox"] for a in truth["annotations"]])
    found = COCODetections(
        np.array([a["image_id"] for a in truth["annotations"]]),
        np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
        np.ones(len(boxes)),
        np.array([a["category_id"] - 1 for a in truth["annotations"]]),
    )
    assert coco_metrics(truth, found, names=NAMES, backend=backend)["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_a_foreign_image_id_is_refused(backend: str) -> None:
    truth, found = scene(2)
    found.image_id[0] = 77
    with pytest.raises(UserError, match="image id 77"):
        coco_metrics(truth, found, names=NAMES, backend=backend)


def test_an_unknown_backend_or_class_is_refused() -> None:
    truth, found = scene(2)
    with pytest.raises(UserError, match="did you mean 'pycocotools'"):
        coco_metrics(truth, found, names=NAMES, backend="pycocotool")
    with pytest.raises(UserError, match="class 'gren'"):
        coco_metrics(truth, found, names=["red", "gren", "blue"])


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    truth, found = scene(4)
    for backend in ("hotcoco", "pycocotools"):
        coco_metrics(truth, found, names=NAMES, backend=backend)
    assert capfd.readouterr() == ("", "")


def real_detections(shared: Path) -> tuple[dict[str, Any], list[str], COCODetections]:
    """The official nano network's detections on the COCO sample; labels index the names in the order of their ids."""
    file = shared / "weights" / "yolox_nano_coco_mini_val_dets.json"
    annotations = shared / "data" / "coco_mini" / "annotations" / "val.json"
    if not (file.is_file() and annotations.is_file()):
        pytest.skip(f"the reference detections are not at {file} (set YOLOXKD_SHARED)")
    truth = json.loads(annotations.read_text())
    categories = sorted(truth["categories"], key=lambda c: c["id"])
    label = {c["id"]: k for k, c in enumerate(categories)}
    rows = json.loads(file.read_text())
    boxes = np.array([r["bbox"] for r in rows])
    boxes[:, 2:] += boxes[:, :2]
    found = COCODetections(
        np.array([r["image_id"] for r in rows]),
        boxes,
        np.array([r["score"] for r in rows]),
        np.array([label[r["category_id"]] for r in rows]),
    )
    return truth, [c["name"] for c in categories], found


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_real_detections_give_the_published_numbers(shared: Path, backend: str) -> None:
    truth, names, found = real_detections(shared)
    numbers = coco_metrics(truth, found, names=names, backend=backend)
    known = {"AP": 31.96, "AP50": 47.55, "AP75": 33.46, "APs": 10.72, "APm": 41.17, "APl": 55.01, "AR100": 41.58}
    assert {k: round(100 * numbers[k], 2) for k in known} == known


def test_both_backends_agree_on_real_detections(shared: Path) -> None:
    truth, names, found = real_detections(shared)
    fast = coco_metrics(truth, found, names=names, backend="hotcoco")
    assert fast == coco_metrics(truth, found, names=names, backend="pycocotools")


def moved_truths(truth: dict[str, Any], names: list[str], seed: int) -> COCODetections:
    """Detections of real ground truth: most objects, moved by some percent, some twice, some of a wrong class, tied scores."""
    rng = np.random.default_rng(seed)
    label = {c["id"]: names.index(c["name"]) for c in truth["categories"]}
    rows = rng.choice(len(truth["annotations"]), 2 * len(truth["annotations"]))
    chosen = [truth["annotations"][i] for i in rows.tolist()]
    xywh = np.array([a["bbox"] for a in chosen], np.float64)
    xywh += rng.normal(0, 0.12, xywh.shape) * xywh[:, [2, 3, 2, 3]]
    xywh[:, 2:] = np.abs(xywh[:, 2:])
    labels = np.array([label[a["category_id"]] for a in chosen])
    labels = np.where(rng.random(len(labels)) < 0.1, rng.integers(0, len(names), len(labels)), labels)
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    image_ids = np.array([a["image_id"] for a in chosen])
    return COCODetections(image_ids, boxes, np.round(rng.random(len(rows)), 2), labels)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("place", ["coco_mini/annotations/val", "coco_mini/annotations/train", "bccd/annotations/test"])
def test_both_backends_agree_on_real_truth(shared: Path, place: str, seed: int) -> None:
    file = shared / "data" / f"{place}.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there (set YOLOXKD_SHARED)")
    truth = json.loads(file.read_text())
    names = [c["name"] for c in truth["categories"]]
    found = moved_truths(truth, names, seed)
    fast = coco_metrics(truth, found, names=names, backend="hotcoco")
    assert fast == coco_metrics(truth, found, names=names, backend="pycocotools")
    assert fast["AP50"] > 0.1
    assert any(a["iscrowd"] for a in truth["annotations"]) == place.startswith("coco_mini")


IDS = {
    "nanoseconds": [1557962307012000000 + k for k in range(6)],
    "beyond float64": [2**53 + 1 + k for k in range(6)],
    "beyond int64": [2**70 + k for k in range(6)],
    "negative": [-5, 3, -(2**60), 0, 17, -1],
}


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize("ids", IDS.values(), ids=list(IDS))
def test_numbers_do_not_depend_on_ids(ids: list[int], backend: str) -> None:
    truth, found = scene(3)
    plain = coco_metrics(truth, found, names=NAMES, backend=backend)
    new = {10 * k: id_ for k, id_ in enumerate(ids)}
    category = {1: ids[2], 2: ids[0], 3: ids[1]}
    moved = {
        "images": [{**image, "id": new[image["id"]]} for image in truth["images"]],
        "categories": [{**c, "id": category[c["id"]]} for c in truth["categories"]],
        "annotations": [
            {**a, "image_id": new[a["image_id"]], "category_id": category[a["category_id"]]}
            for a in truth["annotations"]
        ],
    }
    found.image_id = np.array([new[image] for image in found.image_id.tolist()])
    assert 0 < plain["AP"] < 1
    assert coco_metrics(moved, found, names=NAMES, backend=backend) == plain


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_names_and_paths_do_not_reach_a_backend(backend: str) -> None:
    """A file name in another encoding than UTF-8 ended the run in the backend."""
    truth, found = scene(3)
    plain = coco_metrics(truth, found, names=NAMES, backend=backend)
    strange = {
        **truth,
        "images": [{**image, "file_name": "caf\udce9.jpg"} for image in truth["images"]],
        "categories": [{**c, "name": f"{c['name']}\udce9"} for c in truth["categories"]],
    }
    numbers = coco_metrics(strange, found, names=[f"{name}\udce9" for name in NAMES], backend=backend)
    assert {k: numbers[k] for k in METRIC_NAMES} == {k: plain[k] for k in METRIC_NAMES}


def test_an_id_that_occurs_twice_is_refused() -> None:
    truth, found = scene(3)
    truth["images"].append(truth["images"][0])
    with pytest.raises(UserError, match="several images"):
        coco_metrics(truth, found, names=NAMES)


class PanicException(BaseException):
    """As pyo3 raises it."""


@pytest.mark.parametrize("error", [ValueError("bad\nbox"), PanicException("index out of bounds")])
def test_a_backend_that_fails_is_a_sentence(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise error

    monkeypatch.setattr("yoloxkd.metrics.coco._run_hotcoco", fail)
    truth, found = scene(3)
    with pytest.raises(UserError, match=r"hotcoco could not compute .*(bad box|out of bounds).*backend=pycocotools"):
        coco_metrics(truth, found, names=NAMES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_difficult_object_excuses_what_matches_it_and_nothing_else(backend: str) -> None:
    """A crowd region excuses whatever lies inside it, any number of times."""
    hard = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [100, 100, 200, 200], "area": 40000.0, "iscrowd": 1}
    easy = {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "area": 2500.0, "iscrowd": 0}
    image = {"id": 1, "file_name": "x", "width": 400, "height": 400}

    def ap(inside: list[list[float]], **marks: int) -> float:
        truth = {"images": [image], "categories": [{"id": 1, "name": "a"}], "annotations": [hard | marks, easy]}
        boxes = np.array([*inside, [0, 0, 50, 50]], float)
        scores = np.linspace(0.9, 0.5, len(boxes))
        found = COCODetections(np.ones(len(boxes), np.int64), boxes, scores, np.zeros(len(boxes), np.int64))
        return float(coco_metrics(truth, found, names=["a"], backend=backend)["AP"])

    parts, whole = [[110.0, 110, 130, 130], [150.0, 150, 170, 170]], [[100.0, 100, 300, 300]]
    assert ap(parts) == pytest.approx(1)
    assert ap(parts, difficult=1) == pytest.approx(1 / 3, abs=1e-3)
    assert ap(whole, difficult=1) == pytest.approx(1)
    assert ap(whole * 2, difficult=1) == pytest.approx(1 / 2, abs=1e-3)  # it is one object
