"""The proposal network against the reference vectors `rpn`: float64, assignments and choices exactly."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.parity.vectors import Case, cases, padded
from yoloxkd.nn.assigners.match import Match
from yoloxkd.nn.assigners.max_iou import max_iou_match
from yoloxkd.nn.necks.pooled_fpn import PooledFPN, with_pooled
from yoloxkd.nn.two_stage.anchors import cell_anchors, grid_anchors
from yoloxkd.nn.two_stage.box_code import clip, decode, encode
from yoloxkd.nn.two_stage.proposals import ProposalRule, propose
from yoloxkd.nn.two_stage.rpn import RPN, STRIDES, RPNRule, assign_anchors, rpn_losses
from yoloxkd.nn.two_stage.sampling import sample
from yoloxkd.ops.points import grid_of
from yoloxkd.types import DenseOutput, LossName, Targets


def same(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(
        ours.double(),
        reference.double(),
        rtol=1e-9,
        atol=1e-9 * float(reference.abs().max()) if reference.numel() else 0.0,
    )


def maps(case: Case, prefix: str) -> list[Tensor]:
    return [case.tensor(name) for name in case.family(prefix)]


def output(case: Case, cls: list[Tensor], reg: list[Tensor]) -> DenseOutput:
    return RPN(4).output(cls, reg, tuple(case.params["image"]))


def levels(case: Case) -> list[slice]:
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), case.tensor("level_count").long().cumsum(0)]).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


@pytest.mark.parametrize("case", cases("rpn", "anchors"))
def test_rpn_anchors(case: Case) -> None:
    height, width = case.params["image"]
    (scale,), ratios = case.params["scales"], case.params["ratios"]
    sizes = [(-(-height // s), -(-width // s)) for s in STRIDES]
    grid = grid_of(sizes, STRIDES, torch.device("cpu"), 0.0, len(ratios))
    same(grid_anchors(grid, scale, ratios, torch.float64), case.tensor("anchors"))
    same(torch.stack([cell_anchors(scale * s, ratios) for s in STRIDES]), case.tensor("base_anchors"))


@pytest.mark.parametrize("case", cases("rpn", "coder"))
def test_rpn_box_code(case: Case) -> None:
    same(encode(case.tensor("enc_anchor"), case.tensor("enc_box")), case.tensor("enc_delta"))
    deltas = case.tensor("dec_delta").requires_grad_()
    boxes = decode(case.tensor("dec_anchor"), deltas)
    same(boxes, case.tensor("decoded"))
    clipped = clip(boxes[None], case.tensor("clip_shape").flip(0)[None])[0]
    same(clipped, case.tensor("decoded_clipped"))
    (clipped * case.tensor("dec_pull")).sum().backward()
    assert deltas.grad is not None
    same(deltas.grad, case.tensor("grad_dec"))


@pytest.mark.parametrize("case", cases("rpn", "assign"))
@pytest.mark.parametrize("budget", [None, 1])
def test_rpn_assignment(case: Case, budget: int | None) -> None:
    boxes, p = case.tensor("boxes"), case.params
    valid = torch.ones(1, len(boxes), dtype=torch.bool)
    targets = Targets(boxes[None], valid.long(), valid, ~valid)
    match = max_iou_match(
        case.tensor("anchors"), targets, positive=p["pos_iou_thr"], negative=p["neg_iou_thr"], claim=p["min_pos_iou"],
        budget=budget,
    )  # fmt: skip
    assigned = torch.where(match.ignored, -2, match.gt)[0]
    assert torch.equal(assigned, case.tensor("assigned"))


def match_of(case: Case, out: DenseOutput, targets: Targets) -> Match:
    """Our assignment, checked, with the stored draw."""
    p = case.params
    match = assign_anchors(out, targets, RPNRule(inside=p["allowed_border"] == 0), None)
    if p["allowed_border"] != 0:
        # the release's rule by cells inside the image's own padding; ours, by the picture, is a choice of `content`
        inside = case.tensor("inside").bool()
        match.ignored |= ~inside
        match.fg &= inside
        match.gt.masked_fill_(~inside, -1)
    assert torch.equal(torch.where(match.ignored, -2, match.gt), case.tensor("assigned"))
    keys = torch.zeros_like(match.gt)
    for name, value in (("sample_pos", 2), ("sample_neg", 1)):
        image, anchor = case.tensor(name).long().unbind(1)
        keys[image, anchor] = value
    sampled = sample(match, p["num"], 0.5, keys)
    assert torch.equal(~sampled.ignored, case.tensor("label_weight") > 0)
    assert torch.equal(sampled.fg, case.tensor("target_label") == 0)
    assert sampled.fg.sum(1).tolist() == p["num_pos"]
    return sampled


def check_losses(case: Case, out: DenseOutput, targets: Targets) -> Tensor:
    """Both losses of every level; their sum."""
    match, p = match_of(case, out, targets), case.params
    rule = RPNRule(samples=p["num"], beta=1 / 9 if p["allowed_border"] == 0 else 0.0)
    whole = rpn_losses(out, targets, match, rule)
    for level, part in enumerate(levels(case)):
        ignored = torch.ones_like(match.ignored)
        ignored[:, part] = match.ignored[:, part]
        own = rpn_losses(out, targets, Match(match.fg & ~ignored, match.gt, ignored), rule)
        for term, name in (("rpn/cls", "loss_cls"), ("rpn/box", "loss_bbox")):
            count = whole[LossName("task", term)].count
            assert count is not None
            assert int(count) == p["avg"]
            same(own[LossName("task", term)].total / count, case.tensor(name)[level])
    return torch.stack([loss.mean() for loss in whole.values()]).sum()


def truth(case: Case) -> Targets:
    boxes, labels, mask = padded(case.tensor("boxes"), case.tensor("box_image"), case.params["N"])
    content = None
    if case.params["allowed_border"] == 0:
        shape = case.tensor("img_shape")
        content = torch.cat((torch.zeros_like(shape), shape.flip(1)), 1).to(boxes.dtype)
    return Targets(boxes, labels, mask, torch.zeros_like(mask), content)


@pytest.mark.parametrize("case", cases("rpn", "head"))
def test_rpn_losses_and_gradients(case: Case) -> None:
    cls = [m.requires_grad_() for m in maps(case, "cls")]
    reg = [m.requires_grad_() for m in maps(case, "reg")]
    total = check_losses(case, output(case, cls, reg), truth(case))
    total.backward()
    for prefix, leaves in (("grad_cls", cls), ("grad_reg", reg)):
        for leaf, reference in zip(leaves, maps(case, prefix), strict=True):
            same(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, reference)


def check_proposals(case: Case, out: DenseOutput) -> None:
    p = case.params
    rule = ProposalRule(p["nms_pre"], p["max_per_img"], p["iou_threshold"], p["min_bbox_size"])
    boxes, scores, used = propose(out, rule, case.tensor("img_shape").flip(1))
    assert used.sum(1).tolist() == torch.bincount(case.tensor("proposal_image"), minlength=p["N"]).tolist()
    same(boxes[used], case.tensor("proposals"))
    same(scores[used], case.tensor("proposal_score"))


@pytest.mark.parametrize("case", cases("rpn", "proposals"))
def test_rpn_proposals(case: Case) -> None:
    check_proposals(case, output(case, maps(case, "cls"), maps(case, "reg")))


@pytest.mark.parametrize("case", cases("rpn", "forward"))
def test_rpn_from_features_to_losses(case: Case) -> None:
    features = [m.requires_grad_() for m in maps(case, "feat")]
    rpn = RPN(features[0].shape[1]).double()
    rpn.load_state_dict({name.removeprefix("w__"): case.tensor(name) for name in case.family("w")})
    out = rpn(features, tuple(case.params["image"]))
    flat_cls = torch.cat([m.permute(0, 2, 3, 1).flatten(1) for m in maps(case, "out_cls")], 1)
    same(out.cls_logits[..., 0], flat_cls)
    check_proposals(case, out)
    check_losses(case, out, truth(case)).backward()
    for leaf, reference in zip(features, maps(case, "grad_feat"), strict=True):
        assert leaf.grad is not None
        same(leaf.grad, reference)
    for name, parameter in rpn.named_parameters():
        assert parameter.grad is not None
        same(parameter.grad, case.tensor(f"grad_w__{name}"))


@pytest.mark.parametrize("case", cases("rpn", "neck"))
def test_rpn_neck(case: Case) -> None:
    stages = [m.requires_grad_() for m in maps(case, "stage")]
    neck = PooledFPN([m.shape[1] for m in stages], case.tensor("pyramid__0").shape[1]).double()
    neck.load_state_dict({name.removeprefix("w__"): case.tensor(name) for name in case.family("w")})
    found = with_pooled(neck(stages))
    for ours, reference in zip(found, maps(case, "pyramid"), strict=True):
        same(ours, reference)
    torch.stack([(a * b).sum() for a, b in zip(found, maps(case, "pull"), strict=True)]).sum().backward()
    for leaf, reference in zip(stages, maps(case, "grad_stage"), strict=True):
        assert leaf.grad is not None
        same(leaf.grad, reference)
    for name, parameter in neck.named_parameters():
        assert parameter.grad is not None
        same(parameter.grad, case.tensor(f"grad_w__{name}"))
