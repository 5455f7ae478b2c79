"""DetectionData: the COCO dictionary it gives back, its head, its summary; and how faults are told."""

from __future__ import annotations

import contextlib
import io

import numpy as np

from tests.data.conftest import NAMES, MakeSet
from yoloxkd.data.formats.coco import read_coco
from yoloxkd.data.problems import Faults, Place


def test_ground_truth_is_what_pycocotools_reads(make_set: MakeSet) -> None:
    from pycocotools.coco import COCO

    data = read_coco(*make_set(), NAMES, "val")
    truth = data.ground_truth()
    coco = COCO()
    coco.dataset = truth
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    assert coco.getImgIds() == [30, 10, 20]
    assert [c["name"] for c in coco.loadCats([3, 90])] == NAMES
    assert coco.anns[7] == {
        "id": 7,
        "image_id": 20,
        "category_id": 3,
        "bbox": [2.0, 4.0, 10.0, 20.0],
        "area": 150.5,
        "iscrowd": 0,
    }
    assert coco.getAnnIds(iscrowd=True) == [9]
    assert coco.imgs[30]["height"] == 48


def test_head_keeps_the_first_images_and_their_boxes(make_set: MakeSet) -> None:
    data = read_coco(*make_set(), NAMES, "val")
    head = data.head(1)
    assert (len(head), head.offsets.tolist(), head.annotation_ids.tolist()) == (1, [0, 1], [5])
    assert head.paths == data.paths[:1]
    assert len(data.head(99)) == 3
    assert data.head(3).boxes.shape == data.boxes.shape


def test_summary_counts(make_set: MakeSet) -> None:
    text = read_coco(*make_set(), NAMES, "val").summary()
    assert text == "val: 3 images (1 without a box), 2 boxes (cat 1, dog 1), 1 to ignore"


def test_faults_keep_counts_and_the_first_examples() -> None:
    faults = Faults()
    assert (len(faults), faults.describe()) == (0, "")
    faults.add("clipped", [Place("a.txt", i + 1) for i in range(9)])
    faults.add("clipped", [Place("b.txt")])
    faults.add("dropped", [], 4)
    faults.add("never", [])
    assert len(faults) == 14
    assert faults.examples["clipped"] == [Place("a.txt", i + 1) for i in range(5)]
    assert faults.describe() == "annotations: 10 clipped (e.g. a.txt:1), 4 dropped"


def test_arrays_have_the_documented_types(make_set: MakeSet) -> None:
    data = read_coco(*make_set(), NAMES, "val")
    wanted = {
        "image_ids": np.int64,
        "sizes": np.int32,
        "boxes": np.float64,
        "labels": np.int64,
        "crowd": np.bool_,
        "areas": np.float64,
        "annotation_ids": np.int64,
        "offsets": np.int64,
    }
    assert {name: getattr(data, name).dtype.type for name in wanted} == wanted
