"""The CrowdHuman metrics against the values of the published evaluation, on every folder that has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.vectors import TESTS, vectors_folder
from yoloxkd.data.formats.crowdhuman import is_ignored
from yoloxkd.metrics.crowdhuman import CrowdHumanResult, CrowdImage, crowd_image, crowdhuman_result


def folders() -> list[Any]:
    found = sorted(file.parent for file in vectors_folder("crowdhuman", "*/expected.json").glob("*/expected.json"))
    if not found:
        reason = "the CrowdHuman reference values are not there (set YOLOXKD_VECTORS)"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="crowdhuman-absent")]
    return [pytest.param(folder, id=folder.name) for folder in found]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def corners(boxes: list[list[float]]) -> np.ndarray:
    xywh = np.array(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)


def images(folder: Path) -> list[CrowdImage]:
    detected = {row["ID"]: row for row in rows(folder / "dets.odgt")}
    out = []
    for row in rows(folder / "gt.odgt"):
        found = detected[row["ID"]]
        out.append(
            crowd_image(
                (found["height"], found["width"]),
                corners([box["fbox"] for box in row["gtboxes"]]),
                np.array([is_ignored(box) for box in row["gtboxes"]], bool),
                corners([box["box"] for box in found["dtboxes"]]),
                np.array([box["score"] for box in found["dtboxes"]], np.float64),
            )
        )
    return out


@pytest.mark.parametrize("folder", folders())
def test_numbers_are_those_of_the_published_evaluation(folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    given = images(folder)
    found: CrowdHumanResult = crowdhuman_result(given)
    assert found.ap == pytest.approx(expected["AP"], abs=1e-9)
    assert found.mr == pytest.approx(expected["MR"], abs=1e-9)
    assert found.ji == pytest.approx(expected["JI"], abs=1e-9)
    assert found.true_positives == expected["true_positives"]
    assert found.false_positives == expected["false_positives"]
    assert found.ignored == expected["detections_ignored"]
    assert len(given) == expected["images"]
    assert sum(len(i.real) + len(i.ignored) for i in given) == expected["gt_boxes"]
    assert sum(len(i.ignored) for i in given) == expected["gt_ignored"]
    assert sum(len(i.detections) for i in given) == expected["detections"]
    for step, wanted in zip(found.sweep, expected["JI_sweep"], strict=True):
        assert step.threshold == pytest.approx(wanted["score_thr"], abs=1e-12)
        assert step.ji == pytest.approx(wanted["JI"], abs=1e-9)
        assert (step.matched, step.detections, step.truths) == (wanted["matched"], wanted["detections"], wanted["gt"])


def test_the_repository_s_own_vectors_stay_small() -> None:
    assert sum(file.stat().st_size for file in (TESTS / "vectors").rglob("*") if file.is_file()) < 4_000_000


def test_an_empty_image_counts_only_its_false_alarms() -> None:
    none, box = np.zeros((0, 4)), np.array([[10.0, 10, 50, 90]])
    found = crowdhuman_result(
        [
            crowd_image((100, 100), box, np.zeros(1, bool), box, np.array([0.9])),
            crowd_image((100, 100), none, np.zeros(0, bool), box, np.array([0.8])),
            crowd_image((100, 100), none, np.zeros(0, bool), none, np.zeros(0)),
        ]
    )
    assert (found.true_positives, found.false_positives) == (1, 1)
    assert found.ji == pytest.approx(1.0)  # above 0.8 the false alarm is gone, and so is its image
    assert found.sweep[0].ji == pytest.approx(0.5)


def test_nothing_found_and_nothing_to_find() -> None:
    none, box = np.zeros((0, 4)), np.array([[10.0, 10, 50, 90]])
    missed = crowdhuman_result([crowd_image((100, 100), box, np.zeros(1, bool), none, np.zeros(0))])
    assert (missed.ap, missed.mr, missed.ji) == (0.0, 1.0, 0.0)
    absent = crowdhuman_result([crowd_image((100, 100), box, np.ones(1, bool), box, np.array([0.5]))])
    assert (absent.ap, absent.mr, absent.ji, absent.ignored) == (-1.0, -1.0, -1.0, 1)


def test_the_jaccard_pairs_are_the_best_as_a_whole() -> None:
    """Greedy by score would give the first truth away and leave the second without a partner."""
    truth = np.array([[0.0, 0, 100, 100], [20, 0, 120, 100]])
    found = np.array([[10.0, 0, 110, 100], [-20, 0, 80, 100]])
    image = crowd_image((200, 200), truth, np.zeros(2, bool), found, np.array([0.9, 0.8]))
    assert crowdhuman_result([image]).sweep[0].matched == 2
