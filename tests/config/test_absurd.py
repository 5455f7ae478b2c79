"""Numbers that cannot be meant, and values of another type, are refused by the key that has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from yoloxkd.assembly.recipes import resolve
from yoloxkd.config.load import parse_set, read_yaml
from yoloxkd.config.quantization import Quantization
from yoloxkd.config.recipe import TrainSection
from yoloxkd.config.strict import Strict
from yoloxkd.errors import UserError

NUMBERS = (
    "train.epochs", "train.batch", "train.imgsz", "train.seed", "train.accumulate", "optim.lr_per_image",
    "optim.weight_decay", "optim.momentum", "ema.decay", "ema.ramp", "engine.workers", "student.depth", "student.width",
    "val.max_det", "val.conf", "teacher.scale", "teacher.gate_images", "schedule.warmup_epochs", "schedule.final_epochs",
    "augment.multiscale", "augment.mosaic", "callbacks.plots.pictures",
)  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [1e300, 10**25, float("nan"), float("inf"), -1e300, True, "many", {"a": 1}, [[]]])
def test_an_absurd_value_is_refused_by_its_key(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key) as caught:
        resolve(student="yolox-nano", sets={key: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("section", ["student", "train", "teacher", "kd", "engine", "callbacks", "augment"])
@pytest.mark.parametrize("value", ["5", "[1]", "text"])
def test_a_value_for_a_section_is_refused(section: str, value: str, tmp_path: Path) -> None:
    text = f"student: {{name: yolox-nano}}\n{section}: {value}\n"
    (tmp_path / "r.yaml").write_text(text if section != "student" else f"student: {value}\n")
    with pytest.raises(UserError, match=f"key '{section}' in the recipe should be a section"):
        resolve(recipe=str(tmp_path / "r.yaml"))


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("student: {name: yolox-nano}\ntrain:\nteacher:\nkd:\n")
    assert resolve(recipe=str(tmp_path / "r.yaml")).train.batch == TrainSection().batch


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "9" * 5000,
        "a: 2001-99-99",
        "a: " + "[" * 5000,
        "a: &a [*a]",
        "a: !!timestamp x",
        "a: !!bool x",
        "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{','.join([f'*a{n}'] * 9)}]\n" for n in range(12)),
    ],
)
def test_yaml_that_cannot_be_held_is_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml is not valid YAML") as caught:
        read_yaml(tmp_path / "x.yaml")
    assert len(str(caught.value)) < 500


def test_a_long_value_is_cut_in_the_sentence() -> None:
    with pytest.raises(UserError) as caught:
        parse_set("train.seed=" + "9" * 5000)
    assert len(str(caught.value)) < 200


def test_every_section_refuses_what_is_not_finite() -> None:
    class Section(Strict):
        a: float = 1.0
        b: int = 1
        c: list[float] = [1.0]

    for bad in ({"a": 1e300}, {"b": 10**25}, {"c": [1, float("nan")]}, {"c": [True]}, {"a": False}, {"c": [1, -1e300]}):
        with pytest.raises(ValueError, match="validation error"):
            Section.model_validate(bad)
    with pytest.raises(ValueError, match="validation error"):
        Quantization.model_validate({"seconds": 1e300})
