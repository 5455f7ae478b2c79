"""Mask heads against the reference vectors `mask`: float64, bitmaps exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.parity.test_rcnn import edges, maps, proposals_of
from tests.parity.vectors import Case, cases, padded
from yoloxkd.nn.two_stage.box_head import HeadForm, StageRule
from yoloxkd.nn.two_stage.cascade_rcnn import STAGES
from yoloxkd.nn.two_stage.mask_head import MaskHead, class_channel, mask_loss, mask_targets, sampled_targets
from yoloxkd.nn.two_stage.mask_roi_head import MaskRoIHead
from yoloxkd.nn.two_stage.roi_head import best_pairs
from yoloxkd.ops.nms import NMS
from yoloxkd.soft_masks import paste_masks
from yoloxkd.types import Draw, LossName, Targets


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
    probability = class_channel(case.tensor("logits").sigmoid(), case.tensor("det_label").long())
    same(probability, case.tensor("mask_prob"))
    (height, width), boxes = case.tensor("out_shape")[0].tolist(), case.tensor("det_boxes")
    if case.params["rescale"]:
        boxes = boxes / case.tensor("scale_factor")[0]
    pasted = paste_masks(probability.numpy(), boxes.numpy(), int(height), int(width))
    assert torch.equal(torch.from_numpy(pasted), case.tensor("pasted").bool())


def head_of(case: Case, rules: list[StageRule]) -> MaskRoIHead:
    """The vectors' weights; a single stage's have no number."""
    state = {name.removeprefix("w__"): case.tensor(name) for name in case.family("w")}
    if len(rules) == 1:
        state = {name.replace("_head.", "_head.0.", 1): tensor for name, tensor in state.items()}
    hidden, inputs = state["bbox_head.0.shared_fcs.0.weight"].shape
    mask_hidden = state["mask_head.0.upsample.weight"].shape[0]
    head = MaskRoIHead(
        inputs // 49, case.params["C"], rules, form=HeadForm(hidden), mask_hidden=mask_hidden,
        mask_convs=case.params["convs"],
    ).double()  # fmt: skip
    head.load_state_dict(state)
    return head


@pytest.mark.parametrize("case", cases("mask", "train"))
def test_mask_training(case: Case) -> None:
    """From features and proposals to mask targets, losses and gradients."""
    images, owner = case.params["N"], case.tensor("gt_image").long()
    boxes, labels, mask = padded(case.tensor("boxes"), owner, images, case.tensor("labels"))
    masks = torch.zeros(*mask.shape, *case.params["image"], dtype=torch.bool)
    masks[mask] = case.tensor("gt_masks").bool()
    targets = Targets(boxes, labels, mask, torch.zeros_like(mask), masks=masks)
    head, features = head_of(case, [StageRule(low_quality=True)]), [m.requires_grad_() for m in maps(case, "feat")]
    proposals, used = proposals_of(case)
    regions, matches = head.assign(features, proposals, used, targets, Draw(), edges(case))
    positive = matches[0].fg
    same(regions[0][positive], case.tensor("pos_boxes"))
    wanted, with_mask = sampled_targets(targets, matches[0].gt, regions[0], case.params["mask_size"])
    assert torch.equal(with_mask, positive)
    assert torch.equal(wanted[positive], case.tensor("target").bool())
    losses = head.losses(features, targets, regions, matches)
    loss = losses[LossName("task", "roi/mask")].mean()
    same(loss, case.tensor("loss")[0])
    same(losses[LossName("task", "roi/cls")].mean(), case.tensor("loss_cls"))
    same(losses[LossName("task", "roi/box")].mean(), case.tensor("loss_bbox"))
    loss.backward()
    for leaf, reference in zip(features, maps(case, "grad_feat"), strict=True):
        assert leaf.grad is not None
        same(leaf.grad, reference)
    for name, parameter in head.mask_head[0].named_parameters():
        assert parameter.grad is not None
        same(parameter.grad, case.tensor(f"grad_w__mask_head.{name}"))


@pytest.mark.parametrize("case", [*cases("mask", "test"), *cases("mask", "cascade_test")])
def test_masks_of_detections(case: Case) -> None:
    """From features and proposals to masks of the original image."""
    stds = [stds for _, stds, _ in STAGES] if case.params["agnostic"] else [StageRule().stds]
    head = head_of(case, [StageRule(stds=s, agnostic=case.params["agnostic"]) for s in stds])
    features, (proposals, used) = maps(case, "feat"), proposals_of(case)
    with torch.no_grad():
        areas, stages = edges(case), [head.roi(features, proposals)]
        for number in range(1, len(stds)):
            stages.append(head.roi(features, head.refined(stages[-1], areas), number))
        scores = head.scores(stages) * used.unsqueeze(-1)
        pairs = best_pairs(head.boxes(stages, areas), scores, 10_000)
        for i, (b, s, k) in enumerate(NMS(0.05, 0.5, 12)(*pairs)):
            own = case.tensor("det_image") == i
            scale = case.tensor("scale_factor")[i]
            same(b / scale, case.tensor("det_boxes")[own])
            same(s, case.tensor("det_score")[own])
            some = [m[i : i + 1] for m in features]
            probability = head.mask_probability(some, b[None], k[None])[0]
            same(probability, case.tensor("mask_prob")[own])
            height, width = case.tensor("out_shape")[i].long().tolist()
            pasted = paste_masks(probability.numpy(), (b / scale).numpy(), height, width)
            assert torch.equal(torch.from_numpy(pasted), case.tensor(f"pasted__{i}").bool())
