"""The plan: what is paired with what, and what the user reads about it."""

from __future__ import annotations

import json

import pytest
import torch

from tests.exporters.tiny import TinyDetector as WithoutTowers
from tests.kd.fakes import TinyDetector
from tests.nn.fpn import narrow
from yoloxkd.errors import UserError
from yoloxkd.kd.adapters import Adapters, match_size
from yoloxkd.kd.methods.cwd import CWD, CWDConfig
from yoloxkd.kd.pairing import Pairing, match_classes, table
from yoloxkd.nn.dense.fcos import FCOS
from yoloxkd.nn.dense.gfl import GFL
from yoloxkd.nn.detector import InputConvention
from yoloxkd.types import Tap


def test_levels_are_paired_by_stride() -> None:
    plan = Pairing.between(TinyDetector(levels=(4, 8, 16)), TinyDetector(levels=(8, 16, 32)))
    assert [(p.stride, p.student, p.teacher) for p in plan.levels] == [(8, 1, 0), (16, 2, 1)]
    text = table(plan.describe([Tap.NECK]))
    assert "stride 4" in text
    assert "only the student has it" in text
    assert "only the teacher has it" in text


def test_no_common_stride_shows_both_sides() -> None:
    with pytest.raises(UserError, match=r"student \[4, 8\].*teacher \[16, 32\]"):
        Pairing.between(TinyDetector(levels=(4, 8)), TinyDetector(levels=(16, 32)))


def test_classes_are_matched_by_name() -> None:
    found = match_classes(["Dog", "traffic light", "yak", "cat"], ["cat", "Traffic-Light", "dog", "Cat"])
    assert found.tolist() == [2, 1, -1, 0]


def test_the_table_and_the_stored_plan() -> None:
    student = TinyDetector(4, names=["dog", "yak"])
    teacher = TinyDetector(6, convention=InputConvention(bgr=True))
    plan = Pairing.between(student, teacher, nominal_size=64)
    text = table(plan.describe([Tap.CLS, Tap.REG]))
    lines = text.splitlines()
    assert sum("1x1 adapter" in line for line in lines) == 4
    assert any(line.startswith("classes") and "1 known" in line and line.endswith("yak") for line in lines)
    assert any(line.startswith("input") and "BGR 0-255" in line for line in lines)
    stored = json.loads(json.dumps(plan.as_dict()))
    assert stored["strides"] == [8, 16]
    assert stored["classes"] == [1, -1]
    assert stored["channels"]["features"] == [[4, 6], [4, 6]]
    assert stored["nominal_size"] == 64


def test_other_sizes_are_resized_to_the_teachers() -> None:
    x = torch.rand(1, 3, 4, 5)
    assert match_size(x, (4, 5)) is x
    resized = match_size(x.half(), (8, 10))
    assert resized.dtype == torch.float32
    assert resized.shape == (1, 3, 8, 10)
    torch.testing.assert_close(resized.mean(), x.half().float().mean(), rtol=1e-3, atol=1e-3)


def test_adapters_run_in_float32_under_autocast() -> None:
    plan = Pairing.between(TinyDetector(4), TinyDetector(6))
    adapters = Adapters(plan, ("features",))
    x, t = torch.rand(1, 4, 3, 3), torch.rand(1, 6, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = adapters(x, t, Tap.NECK, plan.levels[0])
    assert cast.dtype == torch.float32
    assert torch.equal(cast, adapters(x, t, Tap.NECK, plan.levels[0]))


def test_the_backbones_maps_are_paired_by_their_own_strides() -> None:
    plan = Pairing.between(narrow(GFL, 2), narrow(FCOS, 2, channels=24))
    assert [level.stride for level in plan.levels_of(Tap.NECK)] == [8, 16, 32, 64, 128]
    backbone = plan.levels_of(Tap.BACKBONE)
    assert [(level.stride, level.student, level.teacher) for level in backbone] == [(8, 0, 0), (16, 1, 1), (32, 2, 2)]
    student, teacher = plan.channels(Tap.BACKBONE, backbone[0])
    assert student == teacher > 0
    assert not Adapters(plan, [Tap.BACKBONE]).convs


def test_maps_that_a_detector_does_not_have_are_refused() -> None:
    plan = Pairing.between(TinyDetector(), WithoutTowers(["cat"]))
    with pytest.raises(UserError, match="the teacher has no cls maps to distil"):
        CWD(CWDConfig(branches=["cls"]), plan)
