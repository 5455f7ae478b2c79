"""PKD against MMRazor's loss: the whole batch, each image by itself, the gradients, and the batch in parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.parity.vectors import Case, cases, close
from yoloxkd.kd.adapters import match_size
from yoloxkd.kd.functional.correlation import channel_moments, correlation_loss
from yoloxkd.types import Loss


def levels(case: Case) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Student (a leaf), student and teacher of one size, level by level."""
    out = []
    for s, t in zip(case.family("feat_S"), case.family("feat_T"), strict=True):
        leaf, theirs = case.tensor(s).requires_grad_(), case.tensor(t)
        sizes = [(x.shape[2], x.shape[3]) for x in (leaf, theirs)]
        if case.params["resize"] == "student":
            out.append((leaf, match_size(leaf, sizes[1]), theirs))
        else:
            out.append((leaf, leaf, match_size(theirs, sizes[0])))
    return out


def moments(ours: Tensor, theirs: Tensor) -> Tensor:
    return channel_moments(ours, theirs, torch.ones_like(ours[:, 0], dtype=torch.bool))


@pytest.mark.parametrize("case", cases("kd_baselines/pkd"))
def test_baselines_pkd_is_that_of_the_whole_batch(case: Case) -> None:
    found = levels(case)
    losses = torch.stack([correlation_loss(moments(ours, theirs)) for _, ours, theirs in found])
    close(losses, case.tensor("loss_level"))
    close(losses.sum(), case.tensor("loss_released"))
    grads = torch.autograd.grad(losses.sum(), [leaf for leaf, _, _ in found])
    for grad, name in zip(grads, case.family("grad_feat_S"), strict=True):
        close(grad, case.tensor(name))


@pytest.mark.parametrize("case", cases("kd_baselines/pkd"))
def test_baselines_pkd_image_by_image(case: Case) -> None:
    found, images = levels(case), case.params["N"]
    each = [
        torch.stack([correlation_loss(moments(ours[i : i + 1], theirs[i : i + 1])) for _, ours, theirs in found]).sum()
        for i in range(images)
    ]
    close(torch.stack(each), case.tensor("loss_each"))
    close(torch.stack(each).mean(), case.tensor("loss_mean"))
    grads = torch.autograd.grad(torch.stack(each).mean(), [leaf for leaf, _, _ in found])
    named = case.family("grad_mean_feat_S") if images > 1 else case.family("grad_feat_S")  # of one image they are equal
    for grad, name in zip(grads, named, strict=True):
        close(grad, case.tensor(name))


@pytest.mark.parametrize("case", cases("kd_baselines/pkd"))
def test_baselines_pkd_in_parts_is_the_whole_batch(case: Case) -> None:
    """Each image a part of its own: the parts' values add up, and each sends its own images' gradient."""
    found, images = levels(case), case.params["N"]
    for (leaf, ours, theirs), expected, name in zip(
        found, case.tensor("loss_level"), case.family("grad_feat_S"), strict=True
    ):
        own = [moments(ours[i : i + 1], theirs[i : i + 1]) for i in range(images)]
        whole = torch.stack(own).sum(0).detach()
        parts = [Loss(torch.ones(()), m, of=correlation_loss).share(whole, images) for m in own]
        close(torch.stack(parts).sum(), expected)
        close(torch.autograd.grad(torch.stack(parts).sum(), leaf)[0], case.tensor(name))
