"""Mask heads against the reference vectors `mask`: float64, bitmaps exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.parity.vectors import Case, cases
from yoloxkd.nn.two_stage.mask_head import MaskHead, mask_loss, mask_targets, own_channel, paste_masks


def same(ours: Tensor, reference: Tensor) -> None:
    largest = float(reference.abs().max()) if reference.numel() else 0.0
    torch.testing.assert_close(ours.double(), reference.double(), rtol=1e-9, atol=1e-9 * largest)


@pytest.mark.parametrize("case", cases("mask", "targets"))
def test_mask_targets(case: Case) -> None:
    image, masks = case.tensor("gt_image"), case.tensor("gt_masks")
    first = torch.tensor([int((image < i).sum()) for i in range(case.params["N"])])
    rows = first[case.tensor("pos_image").long()] + case.tensor("pos_box").long()
    found = mask_targets(masks, rows, case.tensor("pos_boxes"), case.params["mask_size"])
    assert torch.equal(found, case.tensor("target").bool())


@pytest.mark.parametrize("case", cases("mask", "forward"))
def test_mask_head(case: Case) -> None:
    features = case.tensor("roi_feat").requires_grad_()
    hidden = case.array("w__upsample.weight").shape[0]
    head = MaskHead(features.shape[1], case.params["C"], hidden=hidden, convs=case.params["convs"]).double()
    head.load_state_dict({name.removeprefix("w__"): case.tensor(name) for name in case.family("w")})
    logits = head(features)
    same(logits, case.tensor("logits"))
    (logits * case.tensor("pull")).sum().backward()
    assert features.grad is not None
    same(features.grad, case.tensor("grad_feat"))
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None
        same(parameter.grad, case.tensor(f"grad_w__{name}"))


@pytest.mark.parametrize("case", cases("mask", "loss"))
def test_mask_loss(case: Case) -> None:
    logits = case.tensor("logits").requires_grad_()
    used = torch.ones(len(logits), dtype=torch.bool)
    loss = mask_loss(logits, case.tensor("pos_label").long(), case.tensor("target").bool(), used).mean()
    same(loss, case.tensor("loss")[0])
    loss.backward()
    assert logits.grad is not None
    same(logits.grad, case.tensor("grad_logits"))


@pytest.mark.parametrize("case", cases("mask", "paste"))
def test_mask_pasted(case: Case) -> None:
    probability = own_channel(case.tensor("logits").sigmoid(), case.tensor("det_label").long())
    same(probability, case.tensor("mask_prob"))
    (height, width), boxes = case.tensor("out_shape")[0].tolist(), case.tensor("det_boxes")
    if case.params["rescale"]:
        boxes = boxes / case.tensor("scale_factor")[0]
    assert torch.equal(paste_masks(probability, boxes, int(height), int(width)), case.tensor("pasted").bool())
