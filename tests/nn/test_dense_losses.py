"""RetinaNet's and AutoAssign's losses equal a plain reading, and their memory is bounded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.dense_losses import output, with_backward
from benchmarks.scenes import targets_of
from tests.losses import task
from tests.nn.fpn import narrow
from tests.nn.plain_losses import PLAIN, retinanet_assigned
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.assigners import max_iou
from yoloxkd.nn.assigners.inside import InsidePairs, smallest_around
from yoloxkd.nn.dense import autoassign
from yoloxkd.nn.dense.retinanet import NEGATIVE, POSITIVE
from yoloxkd.ops.points import grid_of
from yoloxkd.types import Targets


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", PLAIN)
def test_equal_to_a_plain_reading(family: str, seed: int) -> None:
    model = narrow(DETECTORS[family], 4)  # type: ignore[arg-type]
    out, targets = output(model, 3, 160, 4, seed), targets_of(3, 6, 160, seed, classes=4)
    targets.mask[1, 4:] = False
    ours, plain = (with_backward(f, model, out, targets) for f in (task, PLAIN[family]))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def crowd(images: int, rows: int, size: int) -> Targets:
    return targets_of(images, rows, size, classes=4)


def test_max_iou_looks_at_as_many_pairs_as_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 boxes an image: no table of all of them with all anchors, and the same match."""
    model = narrow(DETECTORS["retinanet"], 4)
    out, targets = output(model, 2, 320, 4), crowd(2, 500, 320)
    assert out.grid.anchors is not None
    sizes, plain = [], max_iou.pairwise_iou
    monkeypatch.setattr(
        max_iou, "pairwise_iou", lambda a, b: sizes.append(a.shape[0] * a.shape[1] * b.shape[-2]) or plain(a, b)
    )
    settings = {"positive": POSITIVE, "negative": NEGATIVE, "claim": 0.0}
    whole = max_iou.max_iou_match(out.grid.anchors, targets, budget=2**30, **settings)  # type: ignore[arg-type]
    parts = max_iou.max_iou_match(out.grid.anchors, targets, budget=2**19, **settings)  # type: ignore[arg-type]
    assert sizes[0] == 2 * 500 * len(out.grid.anchors) > 2**23
    assert max(sizes[1:]) <= 2**19
    for a, b in ((whole.gt, parts.gt), (whole.ignored, parts.ignored)):
        assert torch.equal(a, b)
    row, ignored = retinanet_assigned(out.grid.anchors, targets.boxes[0])
    assert torch.equal(parts.gt[0], row)
    assert torch.equal(parts.ignored[0], ignored)


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["list", "table"])
def test_autoassign_keeps_no_more_than_one_part(devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved for the backward pass does not grow with the number of parts, and the gradients are the same."""
    monkeypatch.setattr("yoloxkd.ops.devices.READ_DEVICES", devices)
    model = narrow(DETECTORS["autoassign"], 4)
    out, targets = output(model, 2, 160, 4), crowd(2, 200, 160)
    assert out.quality is not None
    found = []
    for budget in (2**30, 2**16):
        saved, pairs = 0, 2 * 200 * len(out.grid.points)

        def count(x: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += x.numel()
            return x

        said = out.cls_logits.detach().requires_grad_(), out.quality, out.boxes
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            terms, _ = autoassign.box_terms(*said, out.grid, targets, model.head.center_prior, budget)
        (grad,) = torch.autograd.grad(terms.confidence.sum() + terms.prior.sum(), said[0])
        found.append(SimpleNamespace(saved=saved, grad=grad, confidence=terms.confidence.detach()))
    assert pairs > 2**16
    whole, parts = found
    assert parts.saved < whole.saved / 3
    torch.testing.assert_close(parts.confidence, whole.confidence)
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize("budget", [None, 1])
def test_a_location_answers_for_the_smallest_box_around_it(budget: int | None) -> None:
    grid = grid_of([(8, 8)], [8], torch.device("cpu"), 0.0)
    places = [9, 18, 12, 63]  # 8, 8; 16, 16; 32, 8; 56, 56
    boxes = torch.tensor([[[0.0, 0.0, 40.0, 40.0], [8.0, 4.0, 20.0, 20.0], [0.0, 0.0, 64.0, 64.0]]]).repeat(2, 1, 1)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    targets = Targets(boxes, torch.zeros(2, 3, dtype=torch.int64), mask, torch.zeros_like(mask))
    match = smallest_around(grid, targets, budget)
    assert match.gt[:, places].tolist() == [[0, 1, 0, -1], [0, 1, 0, 2]]
    assert torch.equal(match.fg, match.gt >= 0)
    pairs = InsidePairs.of(grid, boxes, mask)
    assert pairs.total(torch.ones(len(pairs.cell))).tolist() == [[16, 2, 0], [16, 2, 49]]
