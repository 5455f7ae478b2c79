"""Error types on hand-made cases, against the definition of TIDE (Bolya et al., ECCV 2020, section 2.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from yoloxkd.cli.evaluating import errors_table
from yoloxkd.engine.checkpoint_parts import Measured
from yoloxkd.metrics.coco import ERROR_MEANING, COCODetections, error_types

NAMES = ["red", "blue"]
OBJECT = (0.0, 0.0, 100.0, 100.0)
OTHER = (500.0, 500.0, 550.0, 550.0)
Box = tuple[float, float, float, float]


def errors(
    truth: list[tuple[int, Box, bool]], found: list[tuple[int, Box, float]], **keys: Any
) -> dict[str, dict[str, float | int]]:
    """Of one image: objects (label, box, crowd) and detections (label, box, score), boxes xyxy px."""
    annotations = [
        {
            "id": n,
            "image_id": 7,
            "category_id": 10 + label,
            "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]],
            "area": (b[2] - b[0]) * (b[3] - b[1]),
            "iscrowd": int(crowd),
        }
        for n, (label, b, crowd) in enumerate(truth)
    ]
    coco = {
        "images": [{"id": 7, "file_name": "7.jpg", "width": 1000, "height": 1000}],
        "categories": [{"id": 10 + k, "name": name} for k, name in enumerate(NAMES)],
        "annotations": annotations,
    }
    detections = COCODetections(
        np.full(len(found), 7),
        np.array([box for _, box, _ in found], dtype=float).reshape(-1, 4),
        np.array([score for _, _, score in found]),
        np.array([label for label, _, _ in found], dtype=np.int64),
    )
    return error_types(coco, detections, names=NAMES, **keys)


def shifted(by: float) -> Box:
    """IoU with OBJECT (100 - by) / (100 + by)."""
    return by, 0.0, 100.0 + by, 100.0


RED, BLUE = (0, OBJECT, False), (1, OTHER, False)
HIT = (0, OBJECT, 0.9)


@pytest.mark.parametrize(
    ("truth", "found", "expected"),
    [
        ([RED], [HIT], {}),
        ([RED], [(1, OBJECT, 0.9)], {"classification": 1}),  # and not missed as well: the error covers the object
        ([RED], [(0, shifted(50), 0.9)], {"localization": 1}),  # IoU 1/3, class right
        ([RED], [(1, shifted(50), 0.9)], {"both": 1, "missed": 1}),
        ([RED], [HIT, (0, shifted(5), 0.8)], {"duplicate": 1}),
        ([RED], [HIT, (0, (700.0, 700.0, 750.0, 750.0), 0.8)], {"background": 1}),
        ([RED, BLUE], [HIT], {"missed": 1}),
        ([RED, (0, OTHER, True)], [HIT, (0, OTHER, 0.8)], {}),  # a crowd is neither missed nor background
        ([RED], [], {"missed": 1}),
    ],
)
def test_every_kind_on_a_case_made_by_hand(truth: Any, found: Any, expected: dict[str, int]) -> None:
    result = errors(truth, found)
    assert list(result) == list(ERROR_MEANING)
    assert {kind: one["count"] for kind, one in result.items() if one["count"]} == expected


def test_costs_are_what_ap_gains_without_the_errors() -> None:
    """Two red objects, a hit and a loosely placed box: AP50 is 51/101, and 1 when the box is put right."""
    found = errors([RED, (0, OTHER, False)], [HIT, (0, (500.0, 500.0, 525.0, 550.0 + 50), 0.8)])
    assert found["localization"] == {"AP50": pytest.approx(1 - 51 / 101), "count": 1}
    assert found["background"] == {"AP50": 0.0, "count": 0}


def test_what_predict_does_not_show_is_not_counted() -> None:
    found = errors([RED], [HIT, (0, OTHER, 0.2)])
    assert found["background"]["count"] == 0
    assert errors([RED], [HIT, (0, OTHER, 0.2)], conf=0.1)["background"]["count"] == 1


def test_models_stand_side_by_side() -> None:
    plain, taught = errors([RED, BLUE], [HIT]), errors([RED, BLUE], [HIT, (1, OTHER, 0.9)])
    lines = errors_table({"plain.pt": plain, "taught.pt": taught}).splitlines()
    assert lines[0].split() == ["errors", *ERROR_MEANING]
    assert lines[1].split()[-1] == "(1)"
    assert lines[2].split()[-2:] == ["0.0", "(0)"]


def test_a_checkpoint_keeps_them_as_they_are() -> None:
    values = {"AP": 0.5, "per_class": {}, "errors": errors([RED, BLUE], [HIT])}
    assert Measured.model_validate(values).model_dump() == values
