"""The second stage against the reference vectors `rcnn`: float64, assignments and choices exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.vectors import Case, cases, padded
from yoloxkd.nn.assigners.match import Match
from yoloxkd.nn.assigners.max_iou import max_iou_match
from yoloxkd.nn.two_stage.box_code import clip, decode, encode
from yoloxkd.nn.two_stage.box_head import HeadForm, StageRule, class_of, stage_losses
from yoloxkd.nn.two_stage.roi_align import roi_features, roi_levels
from yoloxkd.nn.two_stage.roi_head import RoIHead, assign_regions, best_pairs, sampled_regions
from yoloxkd.ops.nms import NMS
from yoloxkd.types import Draw, LossName, Targets


def same(ours: Tensor, reference: Tensor) -> None:
    largest = float(reference.abs().max()) if reference.numel() else 0.0
    torch.testing.assert_close(ours.double(), reference.double(), rtol=1e-9, atol=1e-9 * largest)


def maps(case: Case, prefix: str) -> list[Tensor]:
    return [case.tensor(name) for name in case.family(prefix)]


def truth(case: Case) -> Targets:
    boxes, labels, mask = padded(
        case.tensor("boxes"), case.tensor("box_image"), case.params["N"], case.tensor("labels")
    )
    return Targets(boxes, labels, mask, torch.zeros_like(mask))


def proposals_of(case: Case) -> tuple[Tensor, Tensor]:
    boxes, _, used = padded(case.tensor("proposals"), case.tensor("proposal_image"), case.params["N"])
    return boxes, used


def edges(case: Case) -> Tensor:
    """(B, 2) x, y px"""
    return case.tensor("img_shape").flip(1).double()


def rule_of(case: Case) -> StageRule:
    p = case.params
    return StageRule(
        p["pos_iou_thr"], tuple(p["stds"]), 1.0, p["match_low_quality"], p["num"], 0.25, p["agnostic"],
        1.0 if p["box_loss"] == "smooth L1" else 0.0,
    )  # fmt: skip


def head_of(case: Case, rules: list[StageRule]) -> RoIHead:
    name = "w__shared_fcs.0.weight" if len(rules) == 1 else "w__bbox_head.0.shared_fcs.0.weight"
    hidden, inputs = case.array(name).shape
    head = RoIHead(inputs // case.params["size"] ** 2, case.params["C"], rules, form=HeadForm(hidden)).double()
    state = {n.removeprefix("w__"): case.tensor(n) for n in case.family("w")}
    head.load_state_dict({n if n.startswith("bbox_head.") else f"bbox_head.0.{n}": t for n, t in state.items()})
    return head


def ragged(x: Tensor, match: Match) -> Tensor:
    return x[~match.ignored]


@pytest.mark.parametrize("case", cases("rcnn", "levels"))
def test_rcnn_levels(case: Case) -> None:
    assert torch.equal(roi_levels(case.tensor("rois")[:, 1:], 4).long(), case.tensor("roi_level").long())


@pytest.mark.parametrize("fixed_shapes", [False, True])  # as on a CPU; as elsewhere and in graphs
@pytest.mark.parametrize("case", cases("rcnn", "roi_align"))
def test_rcnn_region_features(case: Case, fixed_shapes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: fixed_shapes)
    features, rois = [m.requires_grad_() for m in maps(case, "feat")], case.tensor("rois")
    images, strides = case.params["N"], case.params["strides"]
    boxes, _, used = padded(rois[:, 1:], rois[:, 0].long(), images)
    order = torch.argsort(rois[:, 0], stable=True)
    pooled = roi_features(features, strides, boxes, case.params["size"])[used]
    same(pooled, case.tensor("roi_feat")[order])
    (pooled * case.tensor("pull")[order]).sum().backward()
    for leaf, reference in zip(features, maps(case, "grad_feat"), strict=True):
        assert leaf.grad is not None
        same(leaf.grad, reference)


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_rcnn_regions_without_numbers(fixed_shapes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: fixed_shapes)
    boxes = torch.tensor([[[0.0, 0, 8, 8], [torch.nan] * 4, [0, 0, 99, 99]]])
    pooled = roi_features([torch.ones(1, 2, 32 // s, 32 // s) for s in (1, 2)], (4, 8), boxes, 2)
    assert pooled.shape == (1, 3, 2, 2, 2)
    assert pooled.amax((2, 3, 4))[0].tolist() == pytest.approx([1, 0, 1])


@pytest.mark.parametrize("case", cases("rcnn", "coder"))
def test_rcnn_box_code(case: Case) -> None:
    anchors, stds = case.tensor("enc_anchor"), case.params["stds"]
    same(encode(anchors, case.tensor("enc_box"), stds), case.tensor("enc_delta"))
    deltas = case.tensor("dec_delta").unflatten(1, (-1, 4))
    boxes = clip(decode(anchors[:, None], deltas, stds)[None], case.tensor("clip_shape").flip(0)[None])[0]
    same(boxes.flatten(1), case.tensor("decoded"))


@pytest.mark.parametrize("case", cases("rcnn", "assign"))
@pytest.mark.parametrize("budget", [None, 1])
def test_rcnn_assignment(case: Case, budget: int | None) -> None:
    boxes, p = case.tensor("boxes")[None], case.params
    mask = torch.ones(boxes.shape[:2], dtype=torch.bool)
    match = max_iou_match(
        case.tensor("proposals")[None], Targets(boxes, mask.long(), mask, ~mask), positive=p["pos_iou_thr"],
        negative=p["neg_iou_thr"], claim=p["min_pos_iou"] if p["match_low_quality"] else None, budget=budget,
    )  # fmt: skip
    assert torch.equal(match.gt[0], case.tensor("assigned"))
    assert not match.ignored.any()


@pytest.mark.parametrize("case", cases("rcnn", "train"))
def test_rcnn_training(case: Case) -> None:
    """From features and proposals to samples, targets, losses and gradients."""
    p, targets, rule = case.params, truth(case), rule_of(case)
    proposals, used = proposals_of(case)
    match = assign_regions(proposals, used, targets, rule)
    assert torch.equal(match.gt[used], case.tensor("assigned"))
    # of what the release lists in [boxes, proposals] of an image, the stored samples come first
    own = targets.mask.sum(1)
    image = case.tensor("rois")[:, 0].long()
    index = case.tensor("sample_index").long()
    is_box = index < own[image]
    count = proposals.shape[1]
    keys = torch.zeros(p["N"], count + targets.mask.shape[1], dtype=torch.int64)
    keys[image, torch.where(is_box, count + index, index - own[image])] = 1
    boxes, match, proposed = sampled_regions(proposals, used, targets, rule, keys)
    assert match.fg.sum(1).tolist() == p["num_pos"]
    assert (~match.ignored & ~match.fg).sum(1).tolist() == p["num_neg"]
    assert torch.equal(ragged(boxes, match), case.tensor("rois")[:, 1:])
    assert torch.equal(ragged(match.gt, match), case.tensor("sample_box"))
    assert torch.equal(ragged(~proposed, match), case.tensor("sample_is_box").bool())
    assert torch.equal(ragged(class_of(match, targets, p["C"]), match), case.tensor("target_label"))

    features, head = [m.requires_grad_() for m in maps(case, "feat")], head_of(case, [rule])
    said = head.roi(features, boxes)
    same(ragged(said.cls_logits, match), case.tensor("cls"))
    same(ragged(said.box_raw, match), case.tensor("reg"))
    logits, code = said.cls_logits.detach().requires_grad_(), said.box_raw.detach().requires_grad_()
    pair = stage_losses(logits, code, boxes, targets, match, rule)
    torch.stack([loss.mean() for loss in pair]).sum().backward()
    assert logits.grad is not None
    assert code.grad is not None
    same(ragged(logits.grad, match), case.tensor("grad_cls"))
    same(ragged(code.grad, match), case.tensor("grad_reg"))

    losses = head.losses(features, targets, (boxes,), (match,))
    same(losses[LossName("task", "roi/cls")].mean(), case.tensor("loss_cls"))
    same(losses[LossName("task", "roi/box")].mean(), case.tensor("loss_bbox"))
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    check_gradients(case, features, head)


def check_gradients(case: Case, features: list[Tensor], head: RoIHead) -> None:
    for leaf, reference in zip(features, maps(case, "grad_feat"), strict=True):
        assert leaf.grad is not None
        same(leaf.grad, reference)
    for name, parameter in head.named_parameters():
        known = f"grad_w__{name}" if len(head.rules) > 1 else f"grad_w__{name.removeprefix('bbox_head.0.')}"
        assert parameter.grad is not None
        same(parameter.grad, case.tensor(known))


def check_detections(case: Case, boxes: Tensor, scores: Tensor) -> None:
    """boxes (B, P, K or 1, 4) px and scores (B, P, K) to the detections of every image."""
    p = case.params
    nms = NMS(p["score_thr"], p["nms_thr"], p["max_per_img"])
    for i, (b, s, k) in enumerate(nms(*best_pairs(boxes, scores, 10_000))):
        own = case.tensor("det_image") == i
        scale = case.tensor("scale_factor")[i] if p["rescale"] else 1.0
        same(b / scale, case.tensor("det_boxes")[own])
        same(s, case.tensor("det_score")[own])
        assert torch.equal(k, case.tensor("det_label")[own])


@pytest.mark.parametrize("case", cases("rcnn", "detect"))
def test_rcnn_detections(case: Case) -> None:
    rois, reg = case.tensor("rois"), case.tensor("reg").unflatten(1, (-1, 4))
    boxes = clip(decode(rois[:, None, 1:], reg, case.params["stds"])[None], edges(case))
    scores = case.tensor("cls").softmax(-1)
    same(scores, case.tensor("all_scores"))
    scale = case.tensor("scale_factor")[0] if case.params["rescale"] else 1.0
    same((boxes[0] / scale).flatten(1), case.tensor("all_boxes"))
    check_detections(case, boxes, scores[None, :, :-1])


@pytest.mark.parametrize("case", cases("rcnn", "test"))
def test_rcnn_from_features_to_detections(case: Case) -> None:
    rule = StageRule(stds=tuple(case.params["stds"]), agnostic=case.params["agnostic"])
    proposals, used = proposals_of(case)
    head = head_of(case, [rule])
    with torch.no_grad():
        stages = head.stages(maps(case, "feat"), proposals)
        scores = head.scores(stages) * used.unsqueeze(-1)
        check_detections(case, head.boxes(stages, edges(case)), scores)


def cascade_rules(case: Case, **keys: Any) -> list[StageRule]:
    p = case.params
    return [
        StageRule(iou, tuple(stds), weight, agnostic=True, beta=1.0, **keys)
        for stds, iou, weight in zip(
            p["stage_stds"], p.get("stage_iou", (0.5, 0.6, 0.7)), p.get("stage_weights", (1, 1, 1)), strict=True
        )
    ]


@pytest.mark.parametrize("case", cases("rcnn", "cascade_train"))
def test_rcnn_cascade_training(case: Case) -> None:
    head, targets = head_of(case, cascade_rules(case, samples=case.params["num"])), truth(case)
    features, (proposals, used) = [m.requires_grad_() for m in maps(case, "feat")], proposals_of(case)
    regions, matches = head.assign(features, proposals, used, targets, Draw(), edges(case))
    for stage, (boxes, match) in enumerate(zip(regions, matches, strict=True)):
        same(ragged(boxes, match), case.tensor(f"stage_rois__{stage}")[:, 1:])
        assert torch.equal(ragged(match.fg, match), case.tensor(f"stage_positive__{stage}").bool())
        assert torch.equal(
            ragged(class_of(match, targets, case.params["C"]), match), case.tensor(f"stage_label__{stage}")
        )
        said = head.roi(features, boxes, stage)
        same(ragged(said.cls_logits, match), case.tensor(f"stage_cls__{stage}"))
        same(ragged(said.box_raw, match), case.tensor(f"stage_reg__{stage}"))
    losses = head.losses(features, targets, regions, matches)
    for stage in range(3):
        same(losses[LossName("task", f"roi{stage + 1}/cls")].mean(), case.tensor("stage_loss_cls")[stage])
        same(losses[LossName("task", f"roi{stage + 1}/box")].mean(), case.tensor("stage_loss_bbox")[stage])
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    check_gradients(case, features, head)


@pytest.mark.parametrize("case", cases("rcnn", "cascade_test"))
def test_rcnn_cascade_detections(case: Case) -> None:
    head, (proposals, used) = head_of(case, cascade_rules(case)), proposals_of(case)
    features, areas = maps(case, "feat"), edges(case)
    with torch.no_grad():
        stages = [head.roi(features, proposals)]
        for number in (1, 2):
            stages.append(head.roi(features, head.refined(stages[-1], areas), number))
        for number, stage in enumerate(stages):
            same(stage.regions[used], case.tensor(f"stage_rois__{number}")[:, 1:])
            same(stage.cls_logits[used], case.tensor(f"stage_cls__{number}"))
            same(stage.box_raw[used], case.tensor(f"stage_reg__{number}"))
        check_detections(case, head.boxes(stages, areas), head.scores(stages) * used.unsqueeze(-1))
