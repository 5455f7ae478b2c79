"""Teachers whose files have no class names: given, assumed or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nn.test_weights import to_mmdetection
from yoloxkd.assembly.models import build_detector
from yoloxkd.assembly.recipes import resolve
from yoloxkd.assembly.teachers import open_teachers
from yoloxkd.config.recipe import TeacherSection
from yoloxkd.engine.checkpoint import save_checkpoint
from yoloxkd.errors import UserError


@pytest.fixture(scope="module")
def nameless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as Megvii's trainer writes it, of three classes."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "megvii.pth"
    torch.save({"model": build_detector({"name": "yolox-nano"}, ["x"] * 3).state_dict()}, file)
    return file


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "best.pt"
    student = {"name": "yolox-nano", "width": 0.0625}
    state = build_detector(student, ["x", "y"]).state_dict()
    save_checkpoint({"kind": "student", "student": student, "names": ["x", "y"], "imgsz": 64, "model": state}, file)
    return file


def opened(classes: list[str], *models: Path, **keys: Any) -> tuple[list[list[str]], str]:
    """Names of the teachers, and what was said."""
    log: list[str] = []
    section = TeacherSection.model_validate({"models": list(map(str, models)), **keys})
    teachers = open_teachers(section, classes, log.append)
    assert all(t.detector.names == t.weights.names for t in teachers)
    return [t.detector.names for t in teachers], "\n".join(log)


@pytest.mark.parametrize("names", [["a", "b", "c"], "a, b,c", [["a", "b", "c"]]])
def test_names_are_given(nameless: Path, names: Any) -> None:
    names_of, log = opened(["c", "b"], nameless, names=names)
    assert names_of == [["a", "b", "c"]]
    assert "1 of them no class of the data set: a" in log


def test_names_come_from_a_file(nameless: Path, tmp_path: Path) -> None:
    (tmp_path / "obj.names").write_text("a\nb, or so\n\nc\n")
    recipe = resolve(student="yolox-nano", teacher=[str(nameless)], sets={"teacher.names": str(tmp_path / "obj.names")})
    assert recipe.teacher.names == [["a", "b, or so", "c"]]


def test_as_many_classes_as_the_data_set_are_assumed_to_be_its_own(nameless: Path) -> None:
    names_of, log = opened(["a", "b", "c"], nameless)
    assert names_of == [["a", "b", "c"]]
    assert "warning" in log
    assert "teacher.names=[NAME,NAME,...]" in log


def test_another_number_of_classes_needs_names(nameless: Path) -> None:
    with pytest.raises(UserError, match=r"3 classes without names.*data set has 2.*teacher\.names=\[NAME"):
        opened(["a", "b"], nameless)
    names_of, log = opened(["a", "b"], nameless, min_ap=0)
    assert names_of == [["class0", "class1", "class2"]]
    assert "teaches no class by name" in log


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "predicts 3 classes, and teacher.names gives 2"),
        (["x", "y", "z"], "none of the names"),
    ],
)
def test_names_that_cannot_be_right(nameless: Path, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(["a", "b", "c"], nameless, names=names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a", "b"], "none twice"),
        ("a,,b", "none empty"),
        ([True, False, "b"], "true or false"),
        ([["a"], ["b"]], r"2 list\(s\) of names for 1 teacher"),
        ({"a": 1}, "valid list"),
        (5, "valid list"),
    ],
)
def test_names_that_are_none(nameless: Path, names: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(student="yolox-nano", teacher=[str(nameless)], sets={"teacher.names": names})


def test_with_several_teachers_each_has_its_list(nameless: Path, named: Path) -> None:
    names_of, log = opened(["a", "x"], named, nameless, names=[None, ["a", "b", "c"]])
    assert names_of == [["x", "y"], ["a", "b", "c"]]
    assert "warning" not in log
    with pytest.raises(UserError, match="a list of lists, one for each teacher"):
        resolve(student="yolox-nano", teacher=[str(named), str(nameless)], sets={"teacher.names": ["a", "b", "c"]})
    with pytest.raises(UserError, match=r"teacher\.names=\[null,\[NAME"):
        opened(["a", "x"], named, nameless)


def test_names_in_the_file_are_not_replaced_in_silence(named: Path) -> None:
    names_of, log = opened(["a", "x"], named, names=["a", "x"])
    assert names_of == [["a", "x"]]
    assert "warning" in log
    assert "(x, y) give way" in log
    assert "warning" not in opened(["x"], named, names=["x", "y"])[1]


def test_eighty_classes_are_cocos(tmp_path: Path) -> None:
    torch.save({"model": build_detector({"name": "yolox-nano"}, ["x"] * 80).state_dict()}, tmp_path / "x.pth")
    for classes in (["person"], ["red"], ["person", *map(str, range(79))]):
        names_of, log = opened(classes, tmp_path / "x.pth")
        assert names_of[0][0] == "person"
        assert "taken to be COCO's" in log
    others = [f"c{i}" for i in range(80)]
    assert opened(others, tmp_path / "x.pth")[0] == [others]


@pytest.mark.parametrize("meta", [{"CLASSES": ("b", "c", "a")}, {"dataset_meta": {"classes": ["b", "c", "a"]}}])
def test_a_yolox_of_mmdetection_has_the_names_in_its_file(meta: dict[str, Any], nameless: Path, tmp_path: Path) -> None:
    """In their own order, which need not be the data set's."""
    ours = torch.load(nameless, weights_only=True)["model"]
    state = {to_mmdetection(key): value for key, value in ours.items()}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "theirs.pth")
    names_of, log = opened(["a", "b", "c"], tmp_path / "theirs.pth")
    assert names_of == [["b", "c", "a"]]
    assert "no class names" not in log
