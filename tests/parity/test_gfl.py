"""GFL's losses, ATSS assignment, decoding and head against the reference vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.losses import task
from tests.nn.fpn import narrow
from tests.parity.vectors import Case, cases, padded
from yoloxkd.nn.assigners.atss import Match, atss_match, square_anchors, within
from yoloxkd.nn.dense.dense_detector import Predictions
from yoloxkd.nn.dense.gfl import BOX_WEIGHT, DISTRIBUTION_WEIGHT, GFL, encode_distances, expected_distances, gfl_terms
from yoloxkd.ops.boxes import from_distances, paired_iou
from yoloxkd.ops.losses import distribution_focal_loss, giou_loss, quality_focal_loss
from yoloxkd.ops.points import grid_of
from yoloxkd.types import DenseOutput, Grid, Targets

RTOL = 1e-9
ROUNDED = 1e-6
"""The reference head converts its box output to float32."""
PIECES = cases("gfl", "pieces")
ASSIGNMENTS = cases("gfl", "atss")
HEADS = cases("gfl", "head")


def close(got: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    atol = rtol * float(expected.detach().abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(got.detach(), expected.to(got.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", PIECES)
def test_quality_focal_loss(case: Case) -> None:
    logits = case.tensor("qfl_logits").requires_grad_()
    labels, classes = case.tensor("qfl_label"), case.params["C"]
    positive = labels < classes
    rows = quality_focal_loss(logits, labels.clamp(max=classes - 1), positive, case.tensor("qfl_score"))
    close(rows, case.tensor("qfl_rows"))
    value = (rows * case.tensor("qfl_weight")).sum() / case.params["avg_factor"][0]
    close(value, case.tensor("qfl_value"))
    value.backward()
    assert logits.grad is not None
    close(logits.grad, case.tensor("grad_qfl"))


@pytest.mark.parametrize("case", PIECES)
def test_distribution_focal_loss(case: Case) -> None:
    logits = case.tensor("dfl_logits").requires_grad_()
    rows = distribution_focal_loss(logits, case.tensor("dfl_target"))
    close(rows, case.tensor("dfl_rows"))
    value = DISTRIBUTION_WEIGHT * (rows * case.tensor("dfl_weight")).sum() / case.params["avg_factor"][1]
    close(value, case.tensor("dfl_value"))
    value.backward()
    assert logits.grad is not None
    close(logits.grad, case.tensor("grad_dfl"))


@pytest.mark.parametrize("case", PIECES)
def test_overlaps(case: Case) -> None:
    boxes, target = case.tensor("box_pred").requires_grad_(), case.tensor("box_target")
    close(paired_iou(boxes, target, 1e-6), case.tensor("iou_rows"))
    rows = giou_loss(boxes, target)
    close(rows, case.tensor("giou_rows"))
    value = BOX_WEIGHT * (rows * case.tensor("box_weight")).sum() / case.params["avg_factor"][2]
    close(value, case.tensor("giou_value"))
    value.backward()
    assert boxes.grad is not None
    close(boxes.grad, case.tensor("grad_giou"))


@pytest.mark.parametrize("case", PIECES)
def test_decoding_and_encoding(case: Case) -> None:
    expected = expected_distances(case.tensor("dist_logits"))
    close(expected, case.tensor("integral"))
    boxes = from_distances(case.tensor("centre_xy"), expected * case.tensor("stride_r")[:, None])
    close(boxes, case.tensor("decoded_rows"))
    height, width = case.tensor("clip_shape").tolist()
    limit = torch.tensor([width, height, width, height], dtype=torch.float64)
    close(torch.minimum(boxes.clamp(min=0), limit), case.tensor("decoded_clipped"))
    encoded = encode_distances(
        case.tensor("enc_point"), case.tensor("enc_box"), case.tensor("dist_logits").shape[1] // 4 - 1
    )
    close(encoded, case.tensor("enc_dist"))


def grid_in(case: Case) -> Grid:
    """Points, strides and sizes of the case's levels, checked against its anchors."""
    height, width = case.params["image"]
    levels = case.params["strides"]
    if case.has("cls__0"):
        sizes = tuple(tuple(case.tensor(n).shape[2:]) for n in case.family("cls"))
    else:
        sizes = tuple((-(-height // s), -(-width // s)) for s in levels)
        assert [h * w for h, w in sizes] == case.tensor("level_count").tolist()
    grid = grid_of(sizes, levels, torch.device("cpu"), offset=0.0)
    close(square_anchors(grid.points, grid.point_strides), case.tensor("anchors"))
    return grid


def targets_of(case: Case, dtype: torch.dtype = torch.float64) -> Targets:
    image = (
        case.tensor("box_image") if case.has("box_image") else torch.zeros(len(case.array("boxes")), dtype=torch.int64)
    )
    boxes, labels, mask = padded(case.tensor("boxes").to(dtype), image, case.params.get("N", 1), case.tensor("labels"))
    return Targets(boxes, labels, mask, torch.zeros_like(mask))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", ASSIGNMENTS)
def test_assignment(case: Case, dtype: torch.dtype) -> None:
    where = grid_in(case)
    targets = targets_of(case, dtype)
    match = atss_match(where, targets, topk=case.params["topk"])
    assert torch.equal(match.gt[0], case.tensor("assigned"))
    assert torch.equal(match.fg, match.gt >= 0)
    overlap = paired_iou(
        square_anchors(where.points, where.point_strides), targets.boxes[0, match.gt[0].clamp(min=0)], 1e-6
    )
    close(
        torch.where(match.fg[0], overlap, -1.0), case.tensor("assigned_iou"), RTOL if dtype == torch.float64 else 1e-5
    )


def head_output(case: Case) -> tuple[DenseOutput, list[Tensor], list[Tensor]]:
    cls = [case.tensor(n).requires_grad_() for n in case.family("cls")]
    reg = [case.tensor(n).requires_grad_() for n in case.family("reg")]
    model = narrow(GFL, case.params["C"])
    assert isinstance(model, GFL)
    return model.assemble(Predictions(cls, reg), tuple(case.params["image"])), cls, reg


@pytest.mark.parametrize("budget", [None, 1], ids=["together", "image by image"])
@pytest.mark.parametrize("case", HEADS)
def test_targets(case: Case, budget: int | None) -> None:
    where = grid_in(case)
    targets, area = targets_of(case), case.tensor("pad_shape")
    match = atss_match(where, targets, topk=case.params["topk"], area=area, budget=budget)
    assert torch.equal(match.gt, case.tensor("assigned"))
    assert match.fg.sum(1).tolist() == case.params["num_pos"]
    row = match.gt.clamp(min=0)
    labels = torch.where(match.fg, targets.labels.gather(1, row), case.params["C"])
    assert torch.equal(labels, case.tensor("target_label"))
    boxes = targets.boxes.gather(1, row[..., None].expand(-1, -1, 4)) * match.fg[..., None]
    assert torch.equal(boxes, case.tensor("target_box"))
    assert torch.equal(within(where.points, area).double(), case.tensor("label_weight"))


def by_level(rows: Tensor, cell: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """Sum of (B, S) rows of the locations (B, S) over each level: (L,)."""
    ends = torch.tensor([h * w for h, w in sizes]).cumsum(0)
    level = torch.bucketize(cell.contiguous(), ends, right=True)
    return rows.new_zeros(len(sizes)).scatter_add(0, level.flatten(), rows.flatten())


@pytest.mark.parametrize("case", HEADS)
def test_losses_and_gradients(case: Case) -> None:
    out, cls, reg = head_output(case)
    targets, area = targets_of(case), case.tensor("pad_shape")
    match: Match = atss_match(out.grid, targets, topk=case.params["topk"], area=area)
    terms = gfl_terms(out, replace(match, ignored=~within(out.grid.points, area)), targets)
    everywhere = torch.arange(out.grid.points.shape[0]).expand_as(terms.cls)
    weight = terms.weight.clamp(min=1)
    close(by_level(terms.cls / terms.count, everywhere, out.grid.sizes), case.tensor("loss_cls"))
    close(by_level(terms.box / weight, terms.positives.cell, out.grid.sizes), case.tensor("loss_bbox"))
    close(by_level(terms.dfl / weight, terms.positives.cell, out.grid.sizes), case.tensor("loss_dfl"))
    (terms.cls.sum() / terms.count + (terms.box.sum() + terms.dfl.sum()) / weight).backward()
    for tensors, name in ((cls, "grad_cls"), (reg, "grad_reg")):
        for tensor, key in zip(tensors, case.family(name), strict=True):
            assert tensor.grad is not None
            close(tensor.grad, case.tensor(key))


@pytest.mark.parametrize("case", HEADS)
def test_the_method_gives_the_same_losses_when_nothing_is_padded(case: Case) -> None:
    if case.tensor("pad_shape").unique(dim=0).tolist() != [list(case.params["image"])]:
        pytest.skip("a case with padding")
    out, _, _ = head_output(case)
    losses = task(narrow(GFL, case.params["C"]), out, targets_of(case))
    for name, key in (("cls", "loss_cls"), ("box", "loss_bbox"), ("dfl", "loss_dfl")):
        close(losses[name], case.tensor(key).sum())


@pytest.mark.parametrize("case", cases("gfl", "forward"))
def test_head_network(case: Case) -> None:
    features = tuple(case.tensor(n) for n in case.family("feat"))
    weights = {n.removeprefix("w__"): case.tensor(n) for n in case.family("w")}
    settings = {
        "channels": features[0].shape[1],
        "groups": case.params["groups"],
        "stacked_convs": case.params["convs"],
    }
    model = narrow(GFL, case.params["C"], **settings)
    model.head.load_state_dict(weights)
    model.head.double()
    height, width = features[0].shape[2:]
    out = model.on_features(features, (8 * height, 8 * width))
    cls = torch.cat([case.tensor(n).flatten(2) for n in case.family("out_cls")], 2).transpose(1, 2)
    reg = torch.cat([case.tensor(n).flatten(2) for n in case.family("out_reg")], 2).transpose(1, 2)
    close(out.cls_logits, cls)
    close(out.box_raw, reg, ROUNDED)
    first = model.head.cls_convs[0](features[0])
    close(out.cls_features[0], first)


def test_expected_distances_are_float32_under_autocast() -> None:
    logits = torch.randn(3, 4 * 17, generator=torch.Generator().manual_seed(0)) * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = expected_distances(logits)
    assert torch.equal(found, expected_distances(logits))
