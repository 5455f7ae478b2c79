"""RetinaNet's losses, box code, assignment and head against the reference vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.losses import task
from tests.nn.fpn import narrow
from tests.parity.vectors import Case, cases, padded
from yoloxkd.nn.assigners.match import Match, dense_labels, matched_boxes
from yoloxkd.nn.assigners.max_iou import max_iou_match
from yoloxkd.nn.dense.dense_detector import Predictions
from yoloxkd.nn.dense.retinanet import NEGATIVE, POSITIVE, RetinaNet, cell_anchors
from yoloxkd.ops.boxes import from_deltas, pairwise_iou, to_deltas
from yoloxkd.ops.losses import focal_loss
from yoloxkd.ops.points import grid_of
from yoloxkd.types import DenseOutput, Grid, Targets

RTOL = 1e-9
"""Relative to the largest entry of an array."""
STRIDES = (8, 16, 32, 64, 128)
DEVIATIONS = (0.1, 0.1, 0.2, 0.2)
PIECES = cases("retinanet", "pieces")
ASSIGNMENTS = cases("retinanet", "assign")
HEADS = cases("retinanet", "head")


def close(got: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    atol = rtol * float(expected.detach().abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(got.detach(), expected.to(got.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", PIECES)
def test_focal_loss(case: Case) -> None:
    logits = case.tensor("focal_logits").requires_grad_()
    labels, classes = case.tensor("focal_label"), case.params["C"]
    rows = focal_loss(logits, labels.clamp(max=classes - 1), labels < classes)
    close(rows, case.tensor("focal_entries").sum(1))
    value = (rows * case.tensor("focal_weight")).sum() / case.params["avg_factor"][0]
    close(value, case.tensor("focal_value"))
    value.backward()
    assert logits.grad is not None
    close(logits.grad, case.tensor("grad_focal"))


@pytest.mark.parametrize("case", PIECES)
def test_box_code(case: Case) -> None:
    anchors, boxes = case.tensor("code_anchor"), case.tensor("code_box")
    close(to_deltas(boxes, anchors), case.tensor("code_delta"))
    close(to_deltas(boxes, anchors, DEVIATIONS), case.tensor("code_delta_std"))
    code = case.tensor("dec_delta").requires_grad_()
    decoded = from_deltas(code, anchors)
    close(decoded, case.tensor("dec_box"))
    close(from_deltas(code, anchors, DEVIATIONS), case.tensor("dec_box_std"))
    (decoded * case.tensor("dec_cotangent")).sum().backward()
    assert code.grad is not None
    close(code.grad, case.tensor("grad_dec"))


def grid_in(case: Case) -> Grid:
    """The grid of a case's levels in float64, with RetinaNet's anchors."""
    if case.has("cls__0"):
        sizes = tuple(tuple(case.tensor(n).shape[2:]) for n in case.family("cls"))
    else:
        height, width = case.params["image"]
        sizes = tuple((-(-height // s), -(-width // s)) for s in case.params["strides"])
        assert [9 * h * w for h, w in sizes] == case.tensor("level_count").tolist()
    return exact(grid_of(sizes, STRIDES, torch.device("cpu"), 0.0, 9))


def exact(grid: Grid) -> Grid:
    points = grid.points.double()
    return replace(grid, points=points, anchors=cell_anchors(points, grid.point_strides))


def targets_of(case: Case, dtype: torch.dtype = torch.float64) -> Targets:
    image = (
        case.tensor("box_image") if case.has("box_image") else torch.zeros(len(case.array("boxes")), dtype=torch.int64)
    )
    boxes, labels, mask = padded(case.tensor("boxes").to(dtype), image, case.params.get("N", 1), case.tensor("labels"))
    return Targets(boxes, labels, mask, torch.zeros_like(mask))


def within_pad(case: Case, grid: Grid) -> Tensor:
    """(N, P) anchors of cells that start inside each image's padded size."""
    area = case.tensor("pad_shape")
    return (grid.points[:, 0] < area[:, 1:]) & (grid.points[:, 1] < area[:, :1])


def matched(grid: Grid, targets: Targets, usable: Tensor | None = None, budget: int | None = None) -> Match:
    assert grid.anchors is not None
    return max_iou_match(
        grid.anchors, targets, positive=POSITIVE, negative=NEGATIVE, claim=0.0, usable=usable, budget=budget
    )


def as_stored(match: Match, usable: Tensor | None = None) -> Tensor:
    """Row of the box, -1 background, -2 ignored, -3 not used."""
    found = torch.where(match.ignored, -2, match.gt)
    return found if usable is None else torch.where(usable, found, -3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", ASSIGNMENTS)
def test_assignment(case: Case, dtype: torch.dtype) -> None:
    grid, targets = grid_in(case), targets_of(case, dtype)
    if case.has("anchors"):
        close(grid.anchors, case.tensor("anchors"))  # type: ignore[arg-type]
    match = matched(grid, targets)
    assert torch.equal(as_stored(match)[0], case.tensor("assigned"))
    assert torch.equal(match.fg, match.gt >= 0)


def test_tied_overlaps_all_count() -> None:
    """In the release rounding decides which of the anchors around a tiny box are its own; here all that are equal."""
    (case,) = [c.values[0] for c in cases("retinanet", "limit_tiny")]
    if case is None:
        pytest.skip("the reference vectors are not there (set YOLOXKD_VECTORS)")
    for dtype in (torch.float64, torch.float32):
        match = matched(grid_in(case), targets_of(case, dtype))
        assert torch.equal(as_stored(match)[0], case.tensor("assigned_ties"))
    assert not torch.equal(case.tensor("assigned"), case.tensor("assigned_ties"))


def test_a_box_without_area_claims_nothing() -> None:
    """In the release it takes every anchor that it does not overlap, from the boxes before it too."""
    (case,) = [c.values[0] for c in cases("retinanet", "limit_degenerate")]
    if case is None:
        pytest.skip("the reference vectors are not there (set YOLOXKD_VECTORS)")
    grid, targets = grid_in(case), targets_of(case)
    match = matched(grid, targets)
    assert set(match.gt.unique().tolist()) == {-1, 0, 2}
    targets.mask[0, 1] = False
    assert torch.equal(as_stored(match), as_stored(matched(grid, targets)))
    assert int((case.tensor("assigned") == 1).sum()) > 2000


@pytest.mark.parametrize("budget", [None, 1], ids=["together", "box by box"])
@pytest.mark.parametrize("case", HEADS)
def test_targets(case: Case, budget: int | None) -> None:
    grid, targets = grid_in(case), targets_of(case)
    usable = within_pad(case, grid)
    match = matched(grid, targets, usable, budget)
    assert torch.equal(as_stored(match, usable), case.tensor("assigned"))
    assert match.fg.sum(1).tolist() == case.params["num_pos"]
    labels = torch.where(match.fg, dense_labels(match, targets), case.params["C"])
    assert torch.equal(labels, case.tensor("target_label"))
    assert torch.equal((~match.ignored).double(), case.tensor("label_weight"))
    assert grid.anchors is not None
    wanted = to_deltas(matched_boxes(match, targets), grid.anchors).masked_fill(~match.fg.unsqueeze(-1), 0)
    close(wanted, case.tensor("target_delta"))
    best = pairwise_iou(targets.boxes, grid.anchors).masked_fill(~targets.mask.unsqueeze(-1), 0).amax(1)
    close(torch.where(match.fg, best, -1.0), case.tensor("assigned_iou"))


def head_output(case: Case) -> tuple[DenseOutput, list[Tensor], list[Tensor]]:
    cls = [case.tensor(n).requires_grad_() for n in case.family("cls")]
    reg = [case.tensor(n).requires_grad_() for n in case.family("reg")]
    out = narrow(RetinaNet, case.params["C"]).assemble(Predictions(cls, reg), tuple(case.params["image"]))
    return replace(out, grid=exact(out.grid)), cls, reg


@pytest.mark.parametrize("case", HEADS)
def test_losses_and_gradients(case: Case) -> None:
    out, cls, reg = head_output(case)
    targets = targets_of(case)
    model = narrow(RetinaNet, case.params["C"])
    losses = model.losses(out, targets, matched(out.grid, targets, within_pad(case, out.grid)))
    terms = {str(name): loss for name, loss in losses.items()}
    assert {float(loss.count) for loss in terms.values()} == {case.params["avg"]}
    close(terms["cls"].mean(), case.tensor("loss_cls").sum())
    close(terms["box"].mean(), case.tensor("loss_bbox").sum())
    (terms["cls"].mean() + terms["box"].mean()).backward()
    for tensors, name in ((cls, "grad_cls"), (reg, "grad_reg")):
        for tensor, key in zip(tensors, case.family(name), strict=True):
            assert tensor.grad is not None
            close(tensor.grad, case.tensor(key))


@pytest.mark.parametrize("case", HEADS)
def test_the_detectors_own_assignment_gives_the_same_losses(case: Case) -> None:
    """`content` plays the part of the padded size."""
    out, _, _ = head_output(case)
    targets = targets_of(case)
    height, width = case.tensor("pad_shape").unbind(1)
    targets.content = torch.stack((torch.zeros_like(width), torch.zeros_like(width), width, height), 1)
    losses = task(narrow(RetinaNet, case.params["C"]), out, targets)
    for name, key in (("cls", "loss_cls"), ("box", "loss_bbox")):
        close(losses[name], case.tensor(key).sum())


@pytest.mark.parametrize("case", cases("retinanet", "forward"))
def test_head_network(case: Case) -> None:
    features = tuple(case.tensor(n) for n in case.family("feat"))
    settings = {"channels": features[0].shape[1], "stacked_convs": case.params["convs"]}
    model = narrow(RetinaNet, case.params["C"], **settings)
    model.head.load_state_dict({n.removeprefix("w__"): case.tensor(n) for n in case.family("w")})
    model.head.double()
    height, width = features[0].shape[2:]
    out = model.on_features(features, (8 * height, 8 * width))

    def stored(name: str, channels: int) -> Tensor:
        maps = [case.tensor(n).unflatten(1, (9, channels)).permute(0, 3, 4, 1, 2) for n in case.family(name)]
        return torch.cat([m.flatten(1, 3) for m in maps], 1)

    close(out.cls_logits, stored("out_cls", case.params["C"]))
    close(out.box_raw, stored("out_reg", 4))
    close(model.scores(out), case.tensor("det_score"))
    height, width = case.tensor("img_shape").unbind(1)
    limit = torch.stack((width, height, width, height), 1).unsqueeze(1)
    boxes = model.decode(out.box_raw, exact(out.grid))
    close(torch.minimum(boxes.clamp(min=0), limit), case.tensor("det_box"))
    close(out.boxes, boxes, 1e-6)  # from anchors in float32
