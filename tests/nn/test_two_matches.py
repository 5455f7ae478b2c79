"""DDOD and RepPoints, which assign twice: their losses against a plain reading, and how much memory they need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.losses import task
from tests.nn.contract import boxes_of, pictures
from tests.nn.fpn import narrow
from tests.nn.plain_two_matches import PLAIN
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.assigners import match as assigners
from yoloxkd.types import DenseOutput


def said_by(family: str, size: int, images: int = 2) -> tuple[object, DenseOutput]:
    """A narrow detector and an output of it, with classes, boxes and points that are worth something."""
    torch.manual_seed(0)
    model = narrow(DETECTORS[family]).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        out = model(pictures(images, size, size))
    g = torch.Generator().manual_seed(1)
    raw = torch.randn(out.box_raw.shape, generator=g) * (0.5 if family == "ddod" else 3)
    logits = torch.randn(out.cls_logits.shape, generator=g) - 2
    quality = None if out.quality is None else torch.randn(out.quality.shape, generator=g)
    return model, replace(
        out, box_raw=raw, cls_logits=logits, quality=quality, boxes=model.decode(raw, out.grid).detach()
    )


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["list", "table"])
@pytest.mark.parametrize("family", PLAIN)
def test_losses_and_gradients_are_those_of_a_plain_reading(
    family: str, devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yoloxkd.ops.devices.READ_DEVICES", devices)
    model, out = said_by(family, 128)
    targets = boxes_of(2, 6, 128)
    targets.mask[1, 4:] = False
    leaves = [x for x in (out.cls_logits, out.box_raw, out.quality) if x is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    results = []
    for losses in (task, PLAIN[family]):
        found = losses(model, out, targets)  # type: ignore[arg-type]
        results.append([*found.values(), *torch.autograd.grad(torch.stack(list(found.values())).sum(), leaves)])
    assert all(bool(x.abs().sum() > 0) for x in results[0])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", PLAIN)
def test_many_boxes_are_looked_at_within_the_budget(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 boxes an image: what is assigned is the same however small the parts are, and no part is larger than allowed."""
    model, out = said_by(family, 256)
    targets = boxes_of(2, 500, 256)
    whole = model.assign(out, targets)  # type: ignore[attr-defined]
    largest = 500 * len(out.grid.points)
    monkeypatch.setitem(assigners.BUDGET, "cpu", largest)
    peak, divide = [0], torch.Tensor.div_

    def watched(self: torch.Tensor, *args: object, **keys: object) -> torch.Tensor:
        peak[0] = max(peak[0], self.numel())
        return divide(self, *args, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "div_", watched)
    parts = model.assign(out, targets)  # type: ignore[attr-defined]
    assert 0 < peak[0] <= largest
    for a, b in ((whole, parts), (whole.box, parts.box)):
        assert torch.equal(a.gt, b.gt)
        assert torch.equal(a.ignored, b.ignored)
