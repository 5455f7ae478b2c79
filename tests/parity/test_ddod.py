"""DDOD's losses, assignments, level weights and head against the reference vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.nn.fpn import narrow
from tests.parity.vectors import Case, cases, padded
from yoloxkd.nn.assigners.atss import MIN_UNION, square_anchors, within
from yoloxkd.nn.assigners.ddod import ALPHAS, class_factor, ddod_matches, inside
from yoloxkd.nn.assigners.match import Match, TwoMatches
from yoloxkd.nn.dense.ddod import DDOD, ddod_terms, level_weights
from yoloxkd.nn.dense.dense_detector import Predictions
from yoloxkd.nn.dense.square_anchors import BOX_WEIGHT, decode, encode
from yoloxkd.ops.boxes import paired_iou, pairwise_iou
from yoloxkd.ops.losses import focal_loss, giou_loss
from yoloxkd.ops.points import grid_of
from yoloxkd.types import DenseOutput, Grid, Targets

RTOL = 1e-9
PIECES = cases("ddod", "pieces")
ASSIGNMENTS = cases("ddod", "assign")
HEADS = cases("ddod", "head")


def close(got: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    """Relative to the largest entry."""
    atol = rtol * float(expected.detach().abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(got.detach(), expected.to(got.dtype), rtol=0, atol=atol)


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value, of)[0]


@pytest.mark.parametrize("case", PIECES)
def test_focal_loss(case: Case) -> None:
    logits, labels = case.tensor("focal_logits").requires_grad_(), case.tensor("focal_label")
    rows = focal_loss(logits, labels.clamp(max=case.params["C"] - 1), labels < case.params["C"])
    value = (rows * case.tensor("focal_weight")).sum() / case.params["avg_factor"][0]
    close(value, case.tensor("focal_value"))
    close(gradient(value, logits), case.tensor("grad_focal"))


@pytest.mark.parametrize("case", PIECES)
def test_box_code_and_its_losses(case: Case) -> None:
    anchors, boxes = case.tensor("code_anchor"), case.tensor("code_box")
    close(encode(boxes, anchors), case.tensor("code_delta"))
    delta, logits = case.tensor("dec_delta").requires_grad_(), case.tensor("iou_logits").requires_grad_()
    predicted = decode(delta, anchors)
    close(predicted, case.tensor("dec_box"))
    rows = giou_loss(predicted, boxes)
    close(rows, case.tensor("giou_rows"))
    value = BOX_WEIGHT * rows.sum() / case.params["avg_factor"][1]
    close(value, case.tensor("giou_value"))
    close(gradient(value, delta), case.tensor("grad_giou"))
    overlap = paired_iou(predicted.detach(), boxes, MIN_UNION)
    close(overlap, case.tensor("iou_target"))
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, overlap, reduction="sum")
    close(entropy / case.params["avg_factor"][2], case.tensor("iou_value"))
    close(gradient(entropy / case.params["avg_factor"][2], logits), case.tensor("grad_iou"))


@pytest.mark.parametrize("case", PIECES)
def test_level_weights(case: Case) -> None:
    close(level_weights(case.tensor("level_pos"), torch.float64), case.tensor("level_weight"))


def grid_in(case: Case) -> Grid:
    """The case's locations, checked against its anchors."""
    height, width = case.params["image"]
    levels = case.params["strides"]
    sizes = tuple((-(-height // s), -(-width // s)) for s in levels)
    grid = grid_of(sizes, levels, torch.device("cpu"), offset=0.0)
    close(square_anchors(grid.points, grid.point_strides), case.tensor("anchors"))
    return grid


def targets_of(case: Case, dtype: torch.dtype = torch.float64) -> Targets:
    image = (
        case.tensor("box_image") if case.has("box_image") else torch.zeros(len(case.array("boxes")), dtype=torch.int64)
    )
    classes = case.tensor("labels") if case.has("labels") else None
    boxes, labels, mask = padded(case.tensor("boxes").to(dtype), image, case.params.get("N", 1), classes)
    return Targets(boxes, labels, mask, torch.zeros_like(mask))


@pytest.mark.parametrize("case", ASSIGNMENTS)
def test_quality(case: Case) -> None:
    targets, stored = targets_of(case), case.tensor("quality")
    overlap = pairwise_iou(targets.boxes, case.tensor("pred_box").unsqueeze(0), MIN_UNION)[0, : stored.shape[1]]
    for alpha, expected in zip(ALPHAS, stored, strict=True):
        factor = class_factor(case.tensor("logits").unsqueeze(0), targets.labels, alpha)[0, : stored.shape[1]]
        close((factor * overlap).pow(alpha), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", ASSIGNMENTS)
def test_assignment(case: Case, dtype: torch.dtype) -> None:
    logits, boxes = case.tensor("logits").to(dtype).unsqueeze(0), case.tensor("pred_box").to(dtype).unsqueeze(0)
    found = ddod_matches(grid_in(case), logits, boxes, targets_of(case, dtype), order="release")
    for match, name in zip(found, ("topk_cls", "topk_reg"), strict=True):
        assert torch.equal(match.gt[0], case.tensor(name))
        assert torch.equal(match.fg, match.gt >= 0)


@pytest.mark.parametrize("case", ASSIGNMENTS)
def test_order_of_the_paper(case: Case) -> None:
    """The stored qualities, zero outside the box before the best are chosen, box by box."""
    grid, targets, qualities = grid_in(case), targets_of(case), case.tensor("quality")
    found = ddod_matches(grid, case.tensor("logits").unsqueeze(0), case.tensor("pred_box").unsqueeze(0), targets)
    for match, quality in zip(found, qualities, strict=True):
        best: dict[int, tuple[float, int]] = {}
        for row, values in enumerate(quality * inside(grid, targets.boxes)[0, : len(quality)]):
            for cell in values.argsort(descending=True, stable=True)[: case.params["topk"]].tolist():
                value = float(values[cell])
                if value > 0 and value > best.get(cell, (0.0, -1))[0]:
                    best[cell] = (value, row)
        assert {c: int(match.gt[0, c]) for c in match.fg[0].nonzero().flatten().tolist()} == {
            c: row for c, (_, row) in best.items()
        }


def head_output(case: Case) -> tuple[DDOD, DenseOutput, list[list[Tensor]]]:
    said = [[case.tensor(n).requires_grad_() for n in case.family(name)] for name in ("cls", "reg", "iou")]
    model = narrow(DDOD, case.params["C"])
    assert isinstance(model, DDOD)
    before = [case.tensor(f"count_before_{branch}") for branch in ("cls", "reg")]
    model.head.positives.counts.copy_(torch.stack(before))
    return model, model.assemble(Predictions(*said), tuple(case.params["image"])), said


def matches(case: Case, out: DenseOutput, budget: int | None = None) -> TwoMatches:
    area = case.tensor("pad_shape")
    classes, boxes = ddod_matches(
        out.grid, out.cls_logits, out.boxes, targets_of(case), order="release", area=area, budget=budget
    )
    return TwoMatches.beside(replace(classes, ignored=~within(out.grid.points, area)), boxes)


@pytest.mark.parametrize("budget", [None, 1], ids=["together", "image by image"])
@pytest.mark.parametrize("case", HEADS)
def test_targets(case: Case, budget: int | None) -> None:
    _, out, _ = head_output(case)
    match, targets = matches(case, out, budget), targets_of(case)
    outside = match.ignored
    for part, branch in ((match, "cls"), (match.box, "reg")):
        assert torch.equal(torch.where(outside, -3, part.gt), case.tensor(f"assigned_{branch}"))
        assert part.fg.sum(1).tolist() == case.params[f"num_pos_{branch}"]
    row = match.gt.clamp(min=0)
    assert torch.equal(
        torch.where(match.fg, targets.labels.gather(1, row), case.params["C"]), case.tensor("target_label")
    )
    assert torch.equal((~outside).double(), case.tensor("label_weight"))
    boxes = targets.boxes.gather(1, match.box.gt.clamp(min=0)[..., None].expand(-1, -1, 4))
    anchors = square_anchors(out.grid.points, out.grid.point_strides).expand_as(boxes)
    code = encode(torch.where(match.box.fg[..., None], boxes, anchors), anchors)
    close(code, case.tensor("target_delta"))


@pytest.mark.parametrize("case", HEADS)
def test_losses_and_gradients(case: Case) -> None:
    model, out, said = head_output(case)
    match = matches(case, out)
    sums = ddod_terms(out, match, targets_of(case))
    model.train().head.positives(match, out.grid)
    assert torch.equal(model.head.positives.counts[0], case.tensor("count_after_cls").long())
    assert torch.equal(model.head.positives.counts[1], case.tensor("count_after_reg").long())
    weights = level_weights(model.head.positives.counts, torch.float64)
    close(weights, torch.stack([case.tensor("weight_cls"), case.tensor("weight_reg")]))
    parts = {
        "loss_cls": sums["cls"] * weights[0] / case.params["avg_cls"],
        "loss_bbox": sums["box"] * weights[1] / case.params["avg_reg"],
        "loss_iou": sums["iou"] * weights[1] / case.params["avg_reg"],
    }
    for name, value in parts.items():
        close(value, case.tensor(name))
    torch.stack(list(parts.values())).sum().backward()
    for tensors, name in zip(said, ("grad_cls", "grad_reg", "grad_iou_map"), strict=True):
        for tensor, key in zip(tensors, case.family(name), strict=True):
            assert tensor.grad is not None
            close(tensor.grad, case.tensor(key))


@pytest.mark.parametrize("case", HEADS)
def test_the_method_adds_what_the_terms_are(case: Case) -> None:
    model, out, _ = head_output(case)
    losses = model.losses(out, targets_of(case), matches(case, out))
    for loss, name in zip(losses.values(), ("loss_cls", "loss_bbox", "loss_iou"), strict=True):
        close(loss.mean(), case.tensor(name).sum())


@pytest.mark.parametrize("case", cases("ddod", "forward"))
def test_head_network(case: Case) -> None:
    features = tuple(case.tensor(n).double().requires_grad_() for n in case.family("feat"))
    settings = {
        "channels": features[0].shape[1],
        "groups": case.params["groups"],
        "stacked_convs": case.params["convs"],
    }
    model = narrow(DDOD, case.params["C"], **settings).double()
    weights = {n.removeprefix("w__"): case.tensor(n).double() for n in case.family("w")}
    assert model.head.load_state_dict(weights, strict=False).missing_keys == ["positives.counts"]
    height, width = features[0].shape[2:]
    out = model.on_features(features, (8 * height, 8 * width))
    maps = {"cls": out.cls_logits, "reg": out.box_raw, "iou": out.quality.unsqueeze(-1)}
    total = torch.zeros((), dtype=torch.float64)
    for name, values in maps.items():
        close(values, torch.cat([case.tensor(n).flatten(2) for n in case.family(f"out_{name}")], 2).transpose(1, 2))
        towards = [case.tensor(f"cotangent__{name}_{i}").flatten(2) for i in range(len(features))]
        total = total + (values * torch.cat(towards, 2).transpose(1, 2)).sum()
    grads = torch.autograd.grad(total, features)
    for grad, key in zip(grads, case.family("grad_feat"), strict=True):
        close(grad, case.tensor(key))
    shapes = case.tensor("img_shape").double()
    limit = torch.cat((shapes.flip(-1), shapes.flip(-1)), -1).unsqueeze(1)
    close(torch.minimum(out.boxes.clamp(min=0), limit), case.tensor("det_box"))
    close(model.class_probability(out), case.tensor("det_score"))
    close(model.scores(out), case.tensor("det_score") * case.tensor("det_factor").unsqueeze(-1))


def test_a_match_is_two() -> None:
    """What leaves out ignore regions keeps the second match."""
    none = torch.zeros(1, 2, dtype=torch.bool)
    second = Match.of(~none, torch.zeros(1, 2, dtype=torch.int64))
    match = TwoMatches.beside(Match.of(none, torch.full((1, 2), -1)), second)
    targets = Targets(torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.int64), none[:, :0], none[:, :0])
    left = match.leaving_out(targets, grid_of([(1, 2)], [8], torch.device("cpu")))
    assert isinstance(left, TwoMatches)
    assert left.box is second
