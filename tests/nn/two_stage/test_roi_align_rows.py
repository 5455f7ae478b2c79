"""RoIAlign as products with a sparse matrix, against torchvision's kernel."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import roi_align

from yoloxkd.nn.two_stage import roi_align_rows as module
from yoloxkd.nn.two_stage.roi_align_rows import roi_align_rows


def regions(dtype: torch.dtype) -> torch.Tensor:
    """Of every size on maps of 30 x 40 cells of 4 px, with some that are empty, nowhere, inverted, or larger than the map."""
    g = torch.Generator().manual_seed(0)
    center = torch.rand(60, 2, generator=g, dtype=dtype) * torch.tensor([160.0, 120], dtype=dtype)
    side = torch.rand(60, 2, generator=g, dtype=dtype) ** 3 * 200
    boxes = torch.cat((center - side / 2, center + side / 2), 1)
    boxes[0] = -1e5
    boxes[1, 2:] = boxes[1, :2]
    boxes[2] = torch.tensor([0, 0, 160, 120])
    boxes[3] = torch.tensor([-30, -30, 300, 300])
    boxes[4] = torch.tensor([50, 40, 30, 20])
    return torch.cat((torch.randint(0, 2, (60, 1), generator=g).to(dtype), boxes), 1)


@pytest.mark.parametrize("at_once", [2**20, 2000])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling", [0, 1, 2])
def test_values_and_gradients(sampling: int, aligned: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 30, 40, generator=g, dtype=torch.float64)
    wanted = torch.randn(60, 3, 7, 7, generator=g, dtype=torch.float64)
    rois, found = regions(torch.float64), []
    for align in (roi_align_rows, roi_align):
        leaf = x.clone().requires_grad_()
        pooled = align(leaf, rois, 7, 0.25, sampling, aligned)
        pooled.backward(wanted)
        found.append((pooled.detach(), leaf.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_float32_and_maps_in_channels_last() -> None:
    x = torch.randn(2, 5, 30, 40, generator=torch.Generator().manual_seed(2))
    rois = regions(torch.float32)
    expected = roi_align(x, rois, 3, 0.25, 0, True)
    for layout in (torch.contiguous_format, torch.channels_last):
        pooled = roi_align_rows(x.contiguous(memory_format=layout), rois, 3, 0.25, 0, True)
        torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
        assert pooled.is_contiguous()


@pytest.mark.parametrize("sampling", [0, 2])
def test_regions_that_are_not_finite_are_zero(sampling: int) -> None:
    rois = regions(torch.float32)[:3]
    rois[0, 1], rois[1, 3] = torch.nan, torch.inf
    pooled = roi_align_rows(torch.ones(2, 2, 30, 40), rois, 7, 0.25, sampling, True)
    assert not pooled[:2].any()
    assert pooled[2].all()


def test_without_regions() -> None:
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    pooled = roi_align_rows(x, torch.zeros(0, 5), 7, 0.25, 2, True)
    pooled.sum().backward()
    assert pooled.shape == (0, 2, 7, 7)
    assert x.grad is not None
    assert not x.grad.any()
