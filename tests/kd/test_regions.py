"""Foreground weights against a plain reading, box by box, and the corners the published code stumbles over."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kd.fakes import make_batch
from tests.kd.plain import pgd_weights_by_object
from tests.kd.test_across_detectors import detector
from tests.losses import step_of
from yoloxkd.kd.functional import importance as regions
from yoloxkd.kd.functional.importance import (
    COVARIANCE_EPS,
    STRATEGIES,
    Predictions,
    _inside,
    best_of_pairs,
    best_of_table,
    inside_any,
    pgd_weights,
    quality,
    topk_low,
)
from yoloxkd.kd.functional.masks import box_parts
from yoloxkd.kd.methods.pgd import PGD
from yoloxkd.kd.pairing import Pairing
from yoloxkd.ops.points import within_content

XI = (0.8, 0.6)


def grid(size: int, strides: tuple[int, ...]) -> Tensor:
    parts = []
    for s in strides:
        axis = (torch.arange(size // s, dtype=torch.float64) + 0.5) * s
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        parts.append(torch.stack([x, y], -1).reshape(-1, 2))
    return torch.cat(parts)


def scene(images: int, boxes: int, seed: int, size: int = 64) -> tuple[Predictions, Tensor, Tensor, Tensor]:
    """Predictions near their locations; boxes of all sizes, some rows that do not count, some unknown classes."""
    g = torch.Generator().manual_seed(seed)
    points = grid(size, (8, 16))
    far = torch.rand(images, len(points), 4, generator=g, dtype=torch.float64) * 24
    predicted = torch.cat([points - far[..., :2], points + far[..., 2:]], -1)
    probability = torch.rand(images, len(points), 3, generator=g, dtype=torch.float64)
    low = torch.rand(images, boxes, 2, generator=g, dtype=torch.float64) * size * 0.8
    side = torch.rand(images, boxes, 2, generator=g, dtype=torch.float64) * size * 0.6 + 1
    labels = torch.randint(-1, 3, (images, boxes), generator=g)
    rows = torch.rand(images, boxes, generator=g) < 0.8
    return Predictions(points, probability, predicted), torch.cat([low, low + side], -1), labels, rows


def iou(a: list[float], b: list[float]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(w, 0.0) * max(h, 0.0)
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return common / max(both - common, 1e-6)


def plain(
    seen: Predictions, boxes: Tensor, labels: Tensor, rows: Tensor, xi: float, k: int, strategy: str, order: str
) -> Tensor:
    """One image, one box, one location at a time."""
    out = torch.zeros(len(boxes), len(seen.points), dtype=torch.float64)
    for b, g in itertools.product(range(boxes.shape[0]), range(boxes.shape[1])):
        if not rows[b, g]:
            continue
        box, label = boxes[b, g].tolist(), int(labels[b, g])
        inside = [box[0] < x < box[2] and box[1] < y < box[3] for x, y in seen.points.tolist()]
        q = []
        for i, predicted in enumerate(seen.boxes[b].tolist()):
            p = 1.0 if label < 0 else float(seen.probability[b, i, label])
            q.append(p ** (1 - xi) * iou(predicted, box) ** xi)
        chosen = [i for i in range(len(q)) if q[i] > 0 and (inside[i] or order == "release")]
        chosen = sorted(chosen, key=lambda i: (-q[i], i))[:k]
        for i, weight in importance(seen.points[chosen], strategy, box, q, chosen, inside, seen.points).items():
            if inside[i]:
                out[b, i] = max(float(out[b, i]), weight)
    return out


def importance(
    at: Tensor, strategy: str, box: list[float], q: list[float], chosen: list[int], inside: list[bool], points: Tensor
) -> dict[int, float]:
    """Weight of each location of one object."""
    half = [(box[2] - box[0]) / 2, (box[3] - box[1]) / 2]
    middle = [box[0] + half[0], box[1] + half[1]]
    away = [((x - middle[0]) / half[0], (y - middle[1]) / half[1]) for x, y in points.tolist()]
    if strategy == "box":
        return dict.fromkeys(range(len(q)), 1.0)
    if strategy == "centre":
        return {i: 1.0 for i, (x, y) in enumerate(away) if abs(x) < 0.2 and abs(y) < 0.2}
    if strategy == "box-gauss":
        return {i: float(torch.exp(torch.tensor(-(x * x + y * y) / 2).double())) for i, (x, y) in enumerate(away)}
    if strategy == "quality":
        return {i: q[i] for i in range(len(q)) if inside[i]}
    if strategy == "topk-eq" or not chosen:
        return dict.fromkeys(chosen, 1.0)
    d = at - at.mean(0)
    covariance = d.T @ d / len(at) + COVARIANCE_EPS * torch.eye(2, dtype=torch.float64)
    if strategy == "gauss":
        inverse = torch.linalg.inv(covariance)
        return {i: float(torch.exp(-0.5 * v @ inverse @ v)) for i, v in zip(chosen, d, strict=True)}
    inverse = torch.linalg.inv(d.T @ d / len(at) * len(at) ** (-1 / 3) + COVARIANCE_EPS * torch.eye(2).double())
    density = [sum(float(torch.exp(-0.5 * (a - b) @ inverse @ (a - b))) for b in at) for a in at]
    return {i: value / max(density) for i, value in zip(chosen, density, strict=True)}


@given(st.integers(1, 2), st.integers(0, 3), st.integers(0, 5000), st.sampled_from(STRATEGIES), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_equals_a_plain_reading(images: int, boxes: int, seed: int, strategy: str, k: int) -> None:
    args = scene(images, boxes, seed)
    for order in ("paper", "release"):
        found = pgd_weights(*args, xi=XI, k=k, strategy=strategy, order=order)
        for ours, xi in zip(found.expand(2, -1, -1), XI, strict=True):
            torch.testing.assert_close(ours, plain(*args, xi, k, strategy, order), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["list", "table"])
def test_of_several_predictions_at_a_location_the_best_one_counts(
    devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The k best are of locations: nine anchors that see an object well at one place are one of them."""
    monkeypatch.setattr("yoloxkd.ops.devices.READ_DEVICES", devices)
    several = [scene(2, 4, seed)[0] for seed in (11, 12, 13)]
    _, boxes, labels, rows = scene(2, 4, 11)
    probability, predicted = (
        torch.stack([getattr(seen, what) for seen in several], 2).flatten(1, 2) for what in ("probability", "boxes")
    )
    seen = Predictions(several[0].points, probability, predicted)
    found = pgd_weights(seen, boxes, labels, rows, xi=XI, k=6)
    for ours, xi in zip(found, XI, strict=True):
        torch.testing.assert_close(ours, pgd_weights_by_object(seen, boxes, labels, rows, xi, 6), rtol=1e-6, atol=1e-9)
    assert not torch.equal(found, pgd_weights(several[0], boxes, labels, rows, xi=XI, k=6))


def test_a_detector_with_anchors_is_weighed_by_its_cells() -> None:
    torch.manual_seed(0)
    teacher = detector("retinanet", 1).eval()
    batch = make_batch(images=2, size=96, boxes=2)
    batch.targets.mask[:], batch.targets.ignore[:] = True, False
    pgd = PGD(PGD.Config(), Pairing.between(teacher, teacher))
    with torch.no_grad():
        out = teacher(batch.images)
    weights, background = pgd.regions(step_of(out, out, batch, teacher))
    points = out.grid.points[::9]
    seen = Predictions(points, teacher.class_probability(out), out.boxes)
    expected = pgd_weights_by_object(seen, batch.targets.boxes, batch.targets.labels, batch.targets.mask, 0.8)
    found = torch.cat([level.flatten(1) for level in weights["cls"]], 1)
    torch.testing.assert_close(found, expected * within_content(points, batch.content), rtol=1e-4, atol=1e-5)
    assert [level.shape[1:] for level in background] == [torch.Size(size) for size in out.grid.sizes]


@given(st.integers(1, 3), st.integers(0, 5), st.integers(0, 5000), st.booleans(), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_list_and_table_choose_the_same(images: int, boxes: int, seed: int, tied: bool, k: int) -> None:
    seen, at, labels, rows = scene(images, boxes, seed)
    if tied:  # many equal qualities, many of them zero
        seen = Predictions(
            seen.points, (seen.probability * 2).round() / 2, at.new_tensor([8.0, 8, 48, 48]).expand_as(seen.boxes)
        )
    candidates = _inside(seen.points, at) & rows[..., None]
    by_table, by_list = (f(seen, at, labels, candidates, XI, k) for f in (best_of_table, best_of_pairs))
    for best, index in (by_table, by_list):
        assert best.shape == index.shape == (2, images, boxes, min(k, len(seen.points)))
        index.masked_fill_(best == -torch.inf, -1)
    for a, b in zip(by_table, by_list, strict=True):
        torch.testing.assert_close(a.sort(-1).values, b.sort(-1).values, rtol=1e-12, atol=0)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40), st.integers(1, 12))
def test_ties_go_to_the_lower_index(values: list[float], k: int) -> None:
    best, index = topk_low(torch.tensor([values]), k)
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert sorted(index[0].tolist()) == sorted(expected)
    assert sorted(best[0].tolist()) == sorted(values[i] for i in expected)


def test_equal_predictions_choose_the_first_locations() -> None:
    points = grid(64, (8,))
    box = torch.tensor([[[0.0, 0.0, 64.0, 64.0]]], dtype=torch.float64)
    seen = Predictions(points, torch.full((1, 64, 1), 0.5).double(), box[0].expand(1, 64, 4))
    found = pgd_weights(
        seen, box, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).bool(), xi=XI, k=5, strategy="topk-eq"
    )
    assert found[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_fewer_locations_than_k_and_none_at_all() -> None:
    points = grid(64, (16,))
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0, 0, 26.0, 10.0], [9, 9, 15, 15], [64, 64, 64, 64]]]).double()
    seen = Predictions(points, torch.full((1, 16, 1), 0.5).double(), torch.tensor([[0.0, 0, 64, 64]]).expand(1, 16, 4))
    found = pgd_weights(seen, boxes, torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4).bool(), xi=(0.8,), k=30)
    assert found.isfinite().all()
    assert found[0, 0].nonzero().flatten().tolist() == [0, 1]
    assert float(found[0, 0, 0]) == 1.0  # alone in the first box: its own mean


def test_zero_quality_is_never_chosen() -> None:
    points = grid(64, (8,))
    predicted = torch.zeros(1, 64, 4, dtype=torch.float64)
    predicted[0, 9] = torch.tensor([8.0, 8, 16, 16])
    box = torch.tensor([[[0.0, 0, 64, 64]]], dtype=torch.float64)
    seen = Predictions(points, torch.rand(1, 64, 1).double(), predicted)
    for order in ("paper", "release"):
        found = pgd_weights(
            seen, box, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).bool(), xi=XI, order=order
        )
        assert found[0, 0].nonzero().flatten().tolist() == [9]


@pytest.mark.parametrize("direction", [(1, 0), (0, 1), (1, 1), (1, -1)])
def test_collinear_locations_stay_finite_in_float32(direction: tuple[int, int]) -> None:
    steps = torch.arange(20, dtype=torch.float32)[:, None] * 32
    points = 320 + (steps - 304) * torch.tensor(direction, dtype=torch.float32)
    box = torch.tensor([[[-1000.0, -1000, 2000, 2000]]])
    seen = Predictions(points, torch.rand(1, 20, 1), box[0].expand(1, 20, 4))
    found = pgd_weights(seen, box, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).bool(), xi=XI)[0, 0]
    spread = (steps - steps.mean()).flatten()
    expected = torch.exp(-0.5 * spread**2 / spread.square().mean())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("xi", [0.0, 1.0])
def test_the_ends_of_xi(xi: float) -> None:
    """0^0 is 1: quality without localization does not ask for an overlap, and the other way round."""
    seen, boxes, labels, _ = scene(2, 3, 0)
    seen.probability[:, ::2] = 0.0
    q = quality(seen, boxes, labels.clamp_min(0), (xi,))[0].exp()
    assert not q.isnan().any()
    if xi == 0.0:
        expected = seen.probability.transpose(1, 2).gather(1, labels.clamp_min(0)[..., None].expand(-1, -1, q.shape[2]))
        torch.testing.assert_close(q, expected)


def test_a_teacher_gone_astray_chooses_nothing() -> None:
    seen, boxes, labels, rows = scene(1, 3, 0)
    nan = Predictions(seen.points, seen.probability * torch.nan, seen.boxes * torch.nan)
    assert pgd_weights(nan, boxes, labels, rows, xi=XI, strategy="gauss").abs().sum() == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_chunks_change_nothing(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = scene(2, 7, 3)
    whole = pgd_weights(*args, xi=XI, strategy=strategy)
    inside = inside_any(args[0].points, args[1], args[3])
    monkeypatch.setattr(regions, "PAIR_BUDGET", {"other": 2 * 2 * len(args[0].points) * 2})
    assert torch.equal(pgd_weights(*args, xi=XI, strategy=strategy), whole)
    assert torch.equal(inside_any(args[0].points, args[1], args[3]), inside)


def test_content_includes_its_first_edge_only() -> None:
    points = torch.tensor([[0.0, 0.0], [7.9, 7.9], [8.0, 4.0], [4.0, 8.0]])
    assert within_content(points, torch.tensor([[0.0, 0.0, 8.0, 8.0]])).tolist() == [[True, True, False, False]]


def test_autocast_changes_nothing() -> None:
    seen, boxes, labels, rows = scene(2, 4, 5)
    args = Predictions(seen.points.float(), seen.probability.float(), seen.boxes.float()), boxes.float(), labels, rows
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = pgd_weights(*args, xi=XI)
    assert torch.equal(cast, pgd_weights(*args, xi=XI))


def test_the_budget_is_that_of_the_device() -> None:
    """64 images of 640 px, two values of xi, 120 boxes: on a GPU few launches count for more than a CPU's cache."""
    pairs = 64 * 2 * 8400
    on_cpu, on_gpu = (
        list(box_parts(120, pairs, torch.device(device), regions.PAIR_BUDGET)) for device in ("cpu", "cuda")
    )
    assert (len(on_cpu), len(on_gpu)) == (60, 2)
    assert [row for part in on_gpu for row in range(120)[part]] == list(range(120))
