"""SimOTA against a plain loop written from its description, and its edge cases."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from yoloxkd.nn.assigners.match import Match, no_match
from yoloxkd.nn.assigners.simota import simota
from yoloxkd.nn.dense.dense_detector import Predictions
from yoloxkd.nn.dense.yolox import YOLOX
from yoloxkd.types import DenseOutput, Targets


def output(
    images: int, classes: int, size: tuple[int, int], seed: int, dtype: torch.dtype = torch.float64
) -> DenseOutput:
    """A hand-made output of a network with `classes` classes on `size` (height, width) px."""
    generator = torch.Generator().manual_seed(seed)

    def draw(channels: int, stride: int, scale: float, shift: float) -> Tensor:
        shape = (images, channels, size[0] // stride, size[1] // stride)
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)

    model = YOLOX(YOLOX.Config(depth=0.33, width=0.125, depthwise=True), [str(i) for i in range(classes)])
    levels = model.spec.strides
    boxes, objectness, logits = (
        [draw(*keys) for keys in each]
        for each in (
            [(4, s, 0.6, 0.3) for s in levels],
            [(1, s, 2, -1) for s in levels],
            [(classes, s, 2, -1) for s in levels],
        )
    )
    return model.assemble(Predictions(logits, boxes, objectness), size)


def truth(images: int, rows: int, classes: int, size: tuple[int, int], seed: int) -> Targets:
    """Random boxes of every kind: tiny, whole-image, twins, centers outside the image, padding and ignore rows."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    extent = torch.tensor([width, height], dtype=torch.float64)
    center = (torch.rand(images, rows, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.1) * extent
    sides = torch.rand(images, rows, 2, generator=generator, dtype=torch.float64) ** 3 * extent + 1
    boxes = torch.cat((center - sides / 2, center + sides / 2), dim=-1)
    labels = torch.randint(0, classes, (images, rows), generator=generator)
    kind = torch.rand(images, rows, generator=generator)
    mask, ignore = kind < 0.75, kind > 0.9
    if rows > 1:
        boxes[:, 1] = boxes[:, 0]
    boxes = torch.where((mask | ignore).unsqueeze(-1), boxes, 0)
    return Targets(boxes, labels * (mask | ignore), mask, ignore)


def iou(a: list[float], b: list[float]) -> float:
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union > 0 else 0.0


def by_loop(out: DenseOutput, targets: Targets) -> Match:
    """The description of SimOTA, image by image, box by box, cell by cell."""
    assert out.quality is not None
    images, cells = out.quality.shape
    match = no_match(images, cells, out.boxes.device)
    match.score = torch.zeros(images, cells, dtype=out.boxes.dtype)
    points, strides = out.grid.points.tolist(), out.grid.point_strides.tolist()
    for b in range(images):
        rows = targets.mask[b].nonzero().flatten().tolist()
        near: dict[int, set[int]] = {}
        for g in rows:
            x1, y1, x2, y2 = targets.boxes[b, g].tolist()
            cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
            near[g] = {
                a
                for a, ((px, py), s) in enumerate(zip(points, strides, strict=True))
                if abs(px - cx) < 1.5 * s and abs(py - cy) < 1.5 * s
            }
        candidates = sorted(set().union(*near.values())) if near else []
        p = (out.cls_logits[b].float().sigmoid() * out.quality[b].float().sigmoid().unsqueeze(-1)).sqrt()
        overlap = {
            (g, a): iou(targets.boxes[b, g].tolist(), out.boxes[b, a].tolist()) for g in rows for a in candidates
        }
        cost = {}
        for g in rows:
            one_hot = F.one_hot(targets.labels[b, g], p.shape[1]).float()
            for a in candidates:
                of_class = float(F.binary_cross_entropy(p[a], one_hot, reduction="sum"))
                cost[g, a] = of_class - 3 * math.log(overlap[g, a] + 1e-8) + (0 if a in near[g] else 1e6)
        taken: dict[int, list[int]] = {}
        for g in rows:
            k = max(1, int(sum(sorted((overlap[g, a] for a in candidates), reverse=True)[:10])))
            for a in sorted(candidates, key=lambda a: cost[g, a])[:k]:
                taken.setdefault(a, []).append(g)
        for a, takers in taken.items():
            g = takers[0] if len(takers) == 1 else min(rows, key=lambda g: cost[g, a])
            match.fg[b, a], match.gt[b, a], match.score[b, a] = True, g, overlap[g, a]
    return match


def same(got: Match, expected: Match) -> None:
    assert torch.equal(got.fg, expected.fg)
    assert torch.equal(got.gt, expected.gt)
    torch.testing.assert_close(got.score, expected.score, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    images=st.integers(1, 3),
    rows=st.integers(0, 7),
    classes=st.integers(1, 5),
    size=st.sampled_from([(32, 32), (64, 96), (96, 32)]),
    budget=st.sampled_from([1, 400, None]),
)
def test_the_batched_assignment_is_the_loop(
    seed: int, images: int, rows: int, classes: int, size: tuple[int, int], budget: int | None
) -> None:
    out = output(images, classes, size, seed)
    targets = truth(images, rows, classes, size, seed + 1)
    same(simota(out, targets, budget=budget), by_loop(out, targets))


def boxes_to_targets(boxes: list[list[list[float]]], labels: int = 0) -> Targets:
    t = torch.tensor(boxes, dtype=torch.float64)
    mask = t.sum(-1) > 0
    return Targets(t, torch.full(mask.shape, labels), mask, torch.zeros_like(mask))


def test_no_boxes_no_positives() -> None:
    out = output(2, 3, (64, 64), 0)
    for targets in (truth(2, 0, 3, (64, 64), 0), boxes_to_targets([[[0, 0, 0, 0]]] * 2)):
        match = simota(out, targets)
        assert not match.fg.any()
        assert (match.gt == -1).all()
        assert (match.score == 0).all()


def test_every_box_near_the_image_gets_a_cell() -> None:
    boxes = [[[10, 10, 11, 11], [40, 40, 41, 42], [0, 0, 64, 64]], [[1, 1, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0]]]
    match = simota(output(2, 3, (64, 64), 1), boxes_to_targets(boxes))
    assert sorted(set(match.gt[0].tolist())) == [-1, 0, 1, 2]
    assert sorted(set(match.gt[1].tolist())) == [-1, 0]


def test_rows_of_an_image_do_not_touch_another_image() -> None:
    out = output(3, 4, (96, 64), 5)
    targets = truth(3, 6, 4, (96, 64), 6)
    whole = simota(out, targets)
    for i in range(3):
        part = slice(i, i + 1)
        alone = simota(
            replace(out, **{name: getattr(out, name)[part] for name in ("cls_logits", "box_raw", "boxes", "quality")}),
            Targets(targets.boxes[part], targets.labels[part], targets.mask[part], targets.ignore[part]),
        )
        same(alone, Match.of(whole.fg[part], whole.gt[part], whole.score[part]))


def test_five_hundred_boxes() -> None:
    out = output(1, 3, (128, 128), 2, torch.float32)
    targets = truth(1, 500, 3, (128, 128), 3)
    match = simota(out, targets)
    assert 0 < int(match.fg.sum()) <= match.fg.shape[1]
    assert targets.mask[0][match.gt[0][match.fg[0]]].all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 200.0])
def test_broken_predictions_do_not_break_the_assignment(value: float) -> None:
    out = output(1, 3, (64, 64), 4)
    out.boxes = torch.full_like(out.boxes, value)
    match = simota(out, truth(1, 4, 3, (64, 64), 7))
    assert ((match.gt >= 0) == match.fg).all()
