"""RepPoints' moments, losses, both assignments and its head against the reference vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.nn.fpn import narrow
from tests.parity.test_ddod import close, gradient, targets_of
from tests.parity.vectors import Case, cases
from yoloxkd.nn.assigners.atss import within
from yoloxkd.nn.assigners.match import Match, TwoMatches
from yoloxkd.nn.assigners.max_iou import max_iou_match
from yoloxkd.nn.assigners.nearest_point import nearest_point_match
from yoloxkd.nn.dense.dense_detector import Predictions
from yoloxkd.nn.dense.reppoints import BETA, COORDINATES, NEGATIVE, POSITIVE, RepPoints, moment_boxes
from yoloxkd.ops.boxes import paired_iou
from yoloxkd.ops.losses import focal_loss, full_precision
from yoloxkd.ops.points import grid_of
from yoloxkd.types import DenseOutput, Grid, Targets

PIECES = cases("reppoints", "pieces")
FIRST = cases("reppoints", "init")
SECOND = cases("reppoints", "refine")
HEADS = cases("reppoints", "head")
SIZE_DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@pytest.mark.parametrize("case", PIECES)
def test_moments(case: Case) -> None:
    points, transfer = case.tensor("pts").requires_grad_(), case.tensor("transfer").requires_grad_()
    boxes = moment_boxes(points, transfer)
    close(boxes, case.tensor("moment_box"))
    total = (boxes * case.tensor("box_cotangent")).sum()
    for found, name in zip(torch.autograd.grad(total, (points, transfer)), ("grad_pts", "grad_transfer"), strict=True):
        close(found, case.tensor(name))


@pytest.mark.parametrize("case", PIECES)
def test_smooth_l1(case: Case) -> None:
    predicted = case.tensor("sl_pred").requires_grad_()
    entries = torch.nn.functional.smooth_l1_loss(predicted, case.tensor("sl_target"), beta=BETA, reduction="none")
    close(entries, case.tensor("sl_entries"))
    value = 0.5 * (entries * case.tensor("sl_weight")).sum() / case.params["avg_factor"]
    close(value, case.tensor("sl_value"))
    close(gradient(value, predicted), case.tensor("grad_sl"))


def grid_in(case: Case) -> Grid:
    """The case's locations, checked against its points."""
    height, width = case.params["image"]
    levels = case.params["strides"]
    sizes = tuple((-(-height // s), -(-width // s)) for s in levels)
    grid = grid_of(sizes, levels, torch.device("cpu"), offset=0.0)
    if case.has("points"):
        assert torch.equal(grid.points.double(), case.tensor("points"))
    return grid


def second_match(proposals: Tensor, case: Case, dtype: torch.dtype = torch.float64, **keys: object) -> Match:
    targets = targets_of(case, dtype)
    return max_iou_match(proposals, targets, positive=POSITIVE, negative=NEGATIVE, claim=0.0, **keys)  # type: ignore[arg-type]


@SIZE_DTYPES
@pytest.mark.parametrize("case", FIRST)
def test_first_assignment(case: Case, dtype: torch.dtype) -> None:
    match = nearest_point_match(grid_in(case), targets_of(case, dtype))
    assert torch.equal(match.gt[0], case.tensor("assigned_init"))
    assert torch.equal(match.fg, match.gt >= 0)


@SIZE_DTYPES
@pytest.mark.parametrize("case", SECOND)
def test_second_assignment(case: Case, dtype: torch.dtype) -> None:
    proposals = case.tensor("proposals").to(dtype).unsqueeze(0)
    match = second_match(proposals, case, dtype)
    assert torch.equal(torch.where(match.ignored, -2, match.gt)[0], case.tensor("assigned_refine"))
    overlap = paired_iou(proposals, targets_of(case, dtype).boxes[0, match.gt[0].clamp(min=0)], 1e-6)
    stored = case.tensor("assigned_iou").to(dtype)
    torch.testing.assert_close(torch.where(match.fg, overlap, -1.0)[0], stored, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", cases("reppoints", "limit_zero"))
def test_a_box_that_nothing_overlaps_takes_nothing(case: Case) -> None:
    """In the release it takes everything that does not overlap it, from other boxes too."""
    match = second_match(case.tensor("proposals").unsqueeze(0), case)
    released = case.tensor("assigned_refine")
    assert (released == 1).sum() > len(released) / 2
    assert not (match.gt == 1).any()
    assert int((match.gt == 0).sum()) > 0


def head_output(case: Case) -> tuple[RepPoints, DenseOutput, list[list[Tensor]]]:
    said = [[case.tensor(n).requires_grad_() for n in case.family(f)] for f in ("cls", "pts_init", "pts_refine")]
    model = narrow(RepPoints, case.params["C"]).double()
    assert isinstance(model, RepPoints)
    if case.has("transfer"):
        model.head.moment_transfer.data.copy_(case.tensor("transfer"))
    points = [torch.cat(pair, 1) for pair in zip(*said[1:], strict=True)]
    return model, model.assemble(Predictions(said[0], points), tuple(case.params["image"])), said


def matches(case: Case, model: RepPoints, out: DenseOutput, budget: int | None = None) -> TwoMatches:
    area = case.tensor("pad_shape")
    proposals = model.boxes_of(out.box_raw[..., :COORDINATES], out.grid).detach()
    second = second_match(proposals, case, usable=within(out.grid.points, area), budget=budget)
    return TwoMatches.beside(second, nearest_point_match(out.grid, targets_of(case), area=area))


@pytest.mark.parametrize("budget", [None, 1], ids=["together", "image by image"])
@pytest.mark.parametrize("case", HEADS)
def test_targets(case: Case, budget: int | None) -> None:
    model, out, _ = head_output(case)
    close(model.boxes_of(out.box_raw[..., :COORDINATES], out.grid), case.tensor("init_box"))
    close(out.boxes, case.tensor("refine_box"))
    match, targets = matches(case, model, out, budget), targets_of(case)
    outside = ~within(out.grid.points, case.tensor("pad_shape"))
    assert torch.equal(torch.where(outside, -3, match.box.gt), case.tensor("assigned_init"))
    assert torch.equal(
        torch.where(outside, -3, torch.where(match.ignored, -2, match.gt)), case.tensor("assigned_refine")
    )
    assert match.box.fg.sum(1).tolist() == case.params["num_pos_init"]
    assert match.fg.sum(1).tolist() == case.params["num_pos_refine"]
    labels = torch.where(match.fg, targets.labels.gather(1, match.gt.clamp(min=0)), case.params["C"])
    assert torch.equal(torch.where(outside, 0, labels), case.tensor("target_label"))
    assert torch.equal((~match.ignored).double(), case.tensor("label_weight"))


def by_level(rows: Tensor, grid: Grid) -> Tensor:
    return torch.stack([rows[:, part].sum() for part in grid.slices()])


@pytest.mark.parametrize("case", HEADS)
def test_losses_and_gradients(case: Case) -> None:
    model, out, said = head_output(case)
    match, targets = matches(case, model, out), targets_of(case)
    losses = [loss.mean() for loss in model.losses(out, targets, match).values()]
    for loss, name in zip(losses, ("loss_cls", "loss_pts_init", "loss_pts_refine"), strict=True):
        close(loss, case.tensor(name).sum())
    names, counts = ("loss_pts_init", "loss_pts_refine"), ("avg_init", "avg_refine")
    for rows, name, count in zip(model.box_terms(out, targets, match), names, counts, strict=True):
        close(by_level(rows / case.params[count], out.grid), case.tensor(name))
    labels = torch.where(match.fg, targets.labels.gather(1, match.gt.clamp(min=0)), 0)
    rows = focal_loss(full_precision(out.cls_logits), labels, match.fg).masked_fill(match.ignored, 0)
    close(by_level(rows / case.params["avg_refine"], out.grid), case.tensor("loss_cls"))
    torch.stack(losses).sum().backward()
    for tensors, name in zip(said, ("grad_cls", "grad_pts_init", "grad_pts_refine"), strict=True):
        for tensor, key in zip(tensors, case.family(name), strict=True):
            assert tensor.grad is not None
            close(tensor.grad, case.tensor(key))
    if case.has("grad_transfer"):
        close(model.head.moment_transfer.grad, case.tensor("grad_transfer"))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", cases("reppoints", "forward"))
def test_head_network(case: Case) -> None:
    features = tuple(case.tensor(n).double().requires_grad_() for n in case.family("feat"))
    settings = {
        "channels": features[0].shape[1],
        "groups": case.params["groups"] or None,
        "stacked_convs": case.params["convs"],
    }
    model = narrow(RepPoints, case.params["C"], **settings).double()
    model.head.load_state_dict({n.removeprefix("w__"): case.tensor(n).double() for n in case.family("w")})
    height, width = features[0].shape[2:]
    out = model.on_features(features, (8 * height, 8 * width))
    maps = {
        "cls": out.cls_logits,
        "pts_init": out.box_raw[..., :COORDINATES],
        "pts_refine": out.box_raw[..., COORDINATES:],
    }
    total = torch.zeros((), dtype=torch.float64)
    for name, values in maps.items():
        close(values, torch.cat([case.tensor(n).flatten(2) for n in case.family(f"out_{name}")], 2).transpose(1, 2))
        short = name.removeprefix("pts_")
        towards = [case.tensor(f"cotangent__{short}_{i}").flatten(2) for i in range(len(features))]
        total = total + (values * torch.cat(towards, 2).transpose(1, 2)).sum()
    weights = {n.removeprefix("grad_w__"): case.tensor(n) for n in case.family("grad_w")}
    parameters = dict(model.head.named_parameters())
    grads = torch.autograd.grad(total, (*features, *(parameters[n] for n in weights)))
    stored = [*(case.tensor(n) for n in case.family("grad_feat")), *weights.values()]
    for grad, expected in zip(grads, stored, strict=True):
        close(grad, expected)
    shapes = case.tensor("img_shape").double()
    limit = torch.cat((shapes.flip(-1), shapes.flip(-1)), -1).unsqueeze(1)
    close(torch.minimum(out.boxes.clamp(min=0), limit), case.tensor("det_box"))
    close(model.scores(out), case.tensor("det_score"))


def test_points_that_coincide_have_a_gradient() -> None:
    """A deviation of zero is where a square root has none."""
    points = torch.zeros(3, COORDINATES, requires_grad=True)
    boxes = moment_boxes(points, torch.zeros(2))
    assert not boxes.detach().any()
    assert gradient(boxes.sum(), points).isfinite().all()


def test_a_location_in_padding_is_not_the_nearest() -> None:
    grid = grid_of([(4, 4), (2, 2)], [8, 16], torch.device("cpu"), offset=0.0)
    mask = torch.ones(1, 1, dtype=torch.bool)
    targets = Targets(torch.tensor([[[13.0, 13.0, 19.0, 19.0]]]), torch.zeros(1, 1, dtype=torch.int64), mask, ~mask)
    assert nearest_point_match(grid, targets).fg[0].nonzero().item() == 2 * 4 + 2
    targets = replace(targets, content=torch.tensor([[0.0, 0.0, 16.0, 20.0]]))
    assert nearest_point_match(grid, targets).fg[0].nonzero().item() == 2 * 4 + 1
