"""No distiller learns from an ignore region: it is neither foreground nor background to any of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kd.fakes import make_batch
from tests.kd.test_methods import two_gfls
from tests.losses import compared
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import Distiller
from yoloxkd.kd.pairing import Pairing
from yoloxkd.nn.dense_detector import DenseDetector
from yoloxkd.types import Batch, DenseOutput

STATISTICS = ("attention/", "global/", "cls_att/", "reg_att/", "neck_att/")
"""Terms that compare statistics of whole maps: every cell is in them, a region is no object and no background there."""
KEYS = {"ld": {"beta": 1.0, "delta": 1.0}}


def scene() -> Batch:
    """Two objects at the left, and everything at the right of 38 px to be ignored."""
    batch = make_batch(1, boxes=3)
    batch.targets.boxes[0] = torch.tensor([[2.0, 4, 26, 40], [8, 30, 30, 62], [38, 0, 64, 64]])
    batch.targets.mask[0], batch.targets.ignore[0] = torch.tensor([[True, True, False], [False, False, True]])
    return batch


def leaves(out: DenseOutput) -> DenseOutput:
    """The same output with a gradient of its own for every map and table."""

    def leaf(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_()

    maps = {name: tuple(map(leaf, getattr(out, name))) for name in ("features", "cls_features", "reg_features")}
    return replace(out, **maps, cls_logits=leaf(out.cls_logits), box_raw=leaf(out.box_raw))


def learnt(method: Distiller, ours: DenseOutput, theirs: DenseOutput, batch: Batch, teacher: DenseDetector) -> Tensor:
    found = compared(method, ours, theirs, batch, teacher)
    kept = {name: value for name, value in found.items() if not name.startswith(STATISTICS)}
    assert kept
    return torch.stack(list(kept.values())).sum()


@pytest.mark.parametrize("name", [n for n in DISTILLERS if n != "mgd"])
def test_no_gradient_reaches_an_ignore_region(name: str) -> None:
    student, teacher = two_gfls()
    batch = scene()
    with torch.no_grad():
        ours, theirs = student(batch.images), teacher(batch.images)
    ours = leaves(ours)
    kind = DISTILLERS[name]
    method = kind(kind.Config(**KEYS.get(name, {})), Pairing.between(student, teacher))
    learnt(method, ours, theirs, batch, teacher).backward()
    touched = 0
    for tap in ("features", "cls_features", "reg_features"):
        for stride, value in zip(ours.grid.strides, getattr(ours, tap), strict=True):
            if value.grad is not None:
                within = torch.arange(value.shape[3]) * stride > 38  # whole cells, wherever their location is
                assert not value.grad[..., within].any(), (tap, stride)
                touched += int(value.grad[..., ~within].count_nonzero())
    inside = ours.grid.points[:, 0] > 40
    for table in (ours.cls_logits, ours.box_raw):
        if table.grad is not None:
            assert not table.grad[:, inside].any()
            touched += int(table.grad.count_nonzero())
    assert touched > 0
    batch.targets.ignore[:] = False  # without the mask it does learn there
    again = leaves(ours)
    learnt(method, again, theirs, batch, teacher).backward()
    grads = [v.grad[..., 5:] for v in (again.features[0], again.cls_features[0]) if v.grad is not None]
    assert name == "ld" or any(bool(g.any()) for g in grads)


def test_mgd_does_not_ask_what_the_teacher_sees_there() -> None:
    """Its block looks around each cell, so the student's cells there may help others; their own error does not count."""
    student, teacher = two_gfls()
    batch = scene()
    kind = DISTILLERS["mgd"]
    method = kind(kind.Config(), Pairing.between(student, teacher))
    with torch.no_grad():
        ours, theirs = student(batch.images), teacher(batch.images)
        before = learnt(method, ours, theirs, batch, teacher)
        for stride, value in zip(theirs.grid.strides, theirs.features, strict=True):
            value[..., torch.arange(value.shape[3]) * stride > 38] += 3.0
        assert torch.equal(before, learnt(method, ours, theirs, batch, teacher))
        batch.targets.ignore[:] = False
        assert not torch.equal(before, learnt(method, ours, theirs, batch, teacher))
