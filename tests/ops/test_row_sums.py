"""Sums over classes with a written-out gradient, against autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yoloxkd.ops import row_sums as module
from yoloxkd.ops.losses import focal_loss
from yoloxkd.ops.row_sums import confidence_negative, focal, row_sums


@pytest.fixture(params=[2**18, 50, 7], ids=["at once", "an image", "some rows"], autouse=True)
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.AT_ONCE, "cpu", request.param)


def scene(transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (2, 9, 5), some far from zero, with labels and which rows are positive."""
    g = torch.Generator().manual_seed(0)
    shape = (2, 5, 9) if transposed else (2, 9, 5)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 8
    x = x.mT if transposed else x
    return x, torch.randint(0, 5, (2, 9), generator=g), torch.rand(2, 9, generator=g) < 0.4


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_focal_loss(gamma: float, transposed: bool) -> None:
    x, labels, positive = scene(transposed)
    wanted = F.one_hot(labels, 5) * positive.unsqueeze(-1)

    def plain(x: Tensor) -> Tensor:
        p = x.sigmoid()
        hit = torch.where(wanted == 1, p, 1 - p)
        alpha = 0.7 - 0.4 * wanted.double()
        entropy = F.binary_cross_entropy_with_logits(x, wanted.double(), reduction="none")
        return (alpha * (1 - hit) ** gamma * entropy).sum(-1)

    compare(lambda x: focal_loss(x, labels, positive, gamma, 0.3), plain, x)
    assert torch.autograd.gradcheck(
        partial(row_sums, partial(focal, gamma=gamma, share=0.4)),
        (x.detach().requires_grad_(), labels.unsqueeze(-1), positive.unsqueeze(-1)),
    )


def test_focal_loss_in_float32() -> None:
    """Up to `LARGEST` the logarithm of 1 - p stands for softplus."""
    largest = torch.tensor(module.LARGEST).logit() - 1e-5
    x = torch.linspace(-15, float(largest), 2001).unsqueeze(-1)
    labels = torch.zeros(len(x), dtype=torch.int64)

    def of(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        rows = focal_loss(x, labels, labels > 0)
        rows.sum().backward()
        assert x.grad is not None
        return rows.detach().double(), x.grad.double()

    for single, double in zip(of(x), of(x.double()), strict=True):
        torch.testing.assert_close(single, double, rtol=1e-5, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_confidence_that_should_be_zero(transposed: bool) -> None:
    x = scene(transposed)[0].clamp(max=6)
    g = torch.Generator().manual_seed(1)
    quality, share = torch.randn(2, 9, 1, generator=g, dtype=torch.float64), torch.rand(x.shape, generator=g).to(x)

    def plain(x: Tensor, quality: Tensor = quality) -> Tensor:
        y = share * x.sigmoid() * quality.sigmoid()
        return (-(y**2) * torch.log1p(-y)).sum(-1)

    compare(lambda x: row_sums(confidence_negative, x, quality, share), plain, x)
    leaves = quality.requires_grad_(), quality.detach().requires_grad_()
    row_sums(confidence_negative, x, leaves[0], share).square().sum().backward()
    plain(x, leaves[1]).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-9, atol=1e-12)


def test_certainty_is_finite() -> None:
    x, quality = torch.full((1, 3, 2), 200.0, requires_grad=True), torch.full((1, 3, 1), 200.0, requires_grad=True)
    rows = row_sums(confidence_negative, x, quality, torch.ones_like(x))
    rows.sum().backward()
    assert rows.isfinite().all()
    for leaf in (x, quality):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def compare(ours: object, plain: object, x: Tensor) -> None:
    """Values, and gradients of a weighted sum of them; twice, as a graph that is kept allows."""
    found = []
    for function in (ours, plain):
        leaf = x.detach().requires_grad_()
        rows = function(leaf)  # type: ignore[operator]
        total = (rows * torch.arange(1, rows.numel() + 1).view_as(rows)).sum()
        grads = [torch.autograd.grad(total, leaf, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*grads)
        found.append((rows.detach(), grads[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(ours(x), found[0][0])  # type: ignore[operator]
