"""Checkpoints that were changed by hand or by other programs are refused in one sentence that names the place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from yoloxkd.assembly.models import build_detector, open_model, read_weights
from yoloxkd.engine.checkpoint import save_checkpoint
from yoloxkd.engine.checkpoint_parts import SavedExtra, checked
from yoloxkd.errors import UserError

NAN = float("nan")


def best() -> dict[str, Any]:
    torch.manual_seed(0)
    student = {"name": "yolox-nano", "width": 0.0625}
    state = build_detector(student, ["red", "blue"]).state_dict()
    return {"kind": "student", "student": student, "names": ["red", "blue"], "imgsz": 64, "model": state}


def put(value: dict[str, Any], path: str, new: Any) -> dict[str, Any]:
    value = copy.deepcopy(value)
    *parents, last = path.split("/")
    at = value
    for key in parents:
        at = at[int(key) if isinstance(at, list) else key]  # type: ignore[assignment, index]
    if new is DROP:
        del at[last]
    else:
        at[last] = new
    return value


DROP = object()
STEM = "model/backbone.backbone.stem.conv.conv.weight"


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        ("kind", DROP, "its 'kind' is missing"),
        ("kind", "weights", "its 'kind' should be 'student' or 'run'"),
        ("student", "yolox-nano", "its 'student' should be a valid dictionary"),
        ("student/name", DROP, "should have the key 'name'"),
        ("student/name", 5, "unknown model 5"),
        ("student/width", 10**25, "student.width"),
        ("student/depth", 1e300, "student.depth"),
        ("student/depth", NAN, "student.depth"),
        ("student/depthwise", "perhaps", "student.depthwise"),
        ("names", DROP, "its 'names' is missing"),
        ("names", None, "its 'names' should be a valid list"),
        ("names", [], "its 'names' .*at least 1"),
        ("names", ["red", 1], "its 'names.1' should be a valid string"),
        ("names", ["red", "red"], "none twice"),
        ("names", ["red"], "predicts 2 classes and the model 1"),
        ("imgsz", -1, "its 'imgsz' should be a side of 32 to 16384 px"),
        ("imgsz", "64", "its 'imgsz'"),
        ("data", -(10**25), "its 'data' should be a valid dictionary"),
        ("data", {"train": {"images": 1}}, "its 'data.train.objects' is missing"),
        ("images_per_second", "fast", "its 'images_per_second'"),
        ("imgsz", 10**25, "its 'imgsz'"),
        ("model", DROP, "its 'model' is missing"),
        ("model", [1], "its 'model' should be a valid dictionary"),
        (STEM, "x", "stem.conv.conv.weight' should be an instance of Tensor"),
        (STEM, torch.zeros(3), "another architecture"),
        (STEM, torch.zeros(4, 12, 3, 3, dtype=torch.int64), "int64 numbers instead of float32"),
        (STEM, torch.full((4, 12, 3, 3), NAN), "not finite"),
    ],
)
def test_a_changed_student_is_one_sentence(path: str, new: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "best.pt"
    save_checkpoint(put(best(), path, new), file)
    with pytest.raises(UserError, match=message) as caught:
        open_model(str(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


TEACHER = {"source": "t.pt", "digest": "ab", "ap": None, "later": 1}
WEIGHT = {"fixed": None, "seen": 1, "task": torch.tensor(1.0), "own": torch.tensor(2.0)}
COUNTS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        ("kd", None, "its 'kd' should be a section or left out"),
        ("kd/teachers", DROP, "its 'kd.teachers' is missing"),
        ("kd/teachers", [5], "its 'kd.teachers.0' should be a valid dictionary"),
        ("kd/teachers/0/digest", None, "its 'kd.teachers.0.digest'"),
        ("kd/auto/pgd/seen", -1, "its 'kd.auto.pgd.seen'"),
        ("kd/auto/pgd/fixed", NAN, "its 'kd.auto.pgd.fixed'"),
        ("kd/auto/pgd/task", torch.zeros(2), "its 'kd.auto.pgd.task' should be a number in a tensor"),
        ("kd/nonfinite", [torch.tensor(1)], "its 'kd.nonfinite' should be lists of counts"),
        ("best_metrics", None, "its 'best_metrics' should be a section or left out"),
        ("best_metrics", DROP, "both 'best_epoch' and 'best_metrics'"),
        ("early_stopping", {"best": 0.5}, "its 'early_stopping.epoch' is missing"),
    ],
)
def test_what_callbacks_keep_is_checked_too(path: str, new: Any, message: str) -> None:
    extra: dict[str, Any] = {"best_epoch": 0, "best_metrics": {"AP": 0.5, "per_class": {}}}
    extra |= {"early_stopping": {"best": 0.5, "epoch": 0}}
    extra |= {"kd": {"teachers": [TEACHER], "auto": {"pgd": WEIGHT}, "nonfinite": [COUNTS, None]}}
    checked(SavedExtra, extra, "last.pt")
    with pytest.raises(UserError, match=message):
        checked(SavedExtra, put(extra, path, new), "last.pt")


def test_keys_of_other_versions_are_left_alone(tmp_path: Path) -> None:
    save_checkpoint(best() | {"later": {"x": 1}}, tmp_path / "best.pt")
    assert read_weights(str(tmp_path / "best.pt")).names == ["red", "blue"]


def test_a_run_without_its_parts_is_one_sentence(tmp_path: Path) -> None:
    save_checkpoint(best() | {"kind": "run"}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="should have the keys 'run' and 'recipe'"):
        read_weights(str(tmp_path / "last.pt"))
