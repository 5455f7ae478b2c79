"""FCOS's losses, targets, decoding and head against the reference vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.losses import task
from tests.nn.fpn import narrow
from tests.parity.vectors import Case, cases, padded
from yoloxkd.nn.assigners.fcos import Match, fcos_match
from yoloxkd.nn.assigners.match import Positives, centerness
from yoloxkd.nn.dense.dense_detector import Predictions
from yoloxkd.nn.dense.fcos import FCOS
from yoloxkd.ops.boxes import from_distances, paired_iou
from yoloxkd.ops.losses import focal_loss, giou_loss, log_iou_loss
from yoloxkd.ops.points import grid_of
from yoloxkd.types import DenseOutput, Targets

RTOL = 1e-9
ROUNDED = 1e-6
"""The reference rounds centerness targets to float32 in their loss, and the head's box output likewise."""
PIECES = cases("fcos", "pieces")
SCENES = [p for p in cases("fcos") if p.values[0] is None or p.values[0].has("points")]
LOSSES = [p for p in SCENES if p.values[0] is None or p.values[0].has("loss_cls")]


def close(got: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    atol = rtol * float(expected.detach().abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(got.detach(), expected.to(got.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", PIECES)
def test_focal_loss(case: Case) -> None:
    logits = case.tensor("focal_logits").requires_grad_()
    labels, classes = case.tensor("focal_label"), case.params["C"]
    rows = focal_loss(logits, labels.clamp(max=classes - 1), labels < classes)
    close(rows, case.tensor("focal_entries").sum(-1))
    # every entry alone is a problem of one class
    positive = labels[:, None] == torch.arange(classes)
    entries = focal_loss(logits[..., None], torch.zeros_like(positive, dtype=torch.int64), positive)
    close(entries, case.tensor("focal_entries"))
    value = rows.sum() / case.params["avg_factor"][0]
    close(value, case.tensor("focal_value"))
    value.backward()
    assert logits.grad is not None
    close(logits.grad, case.tensor("grad_focal"))


@pytest.mark.parametrize("case", PIECES)
@pytest.mark.parametrize(("loss", "name", "place"), [(log_iou_loss, "iou", 1), (giou_loss, "giou", 2)])
def test_box_losses(case: Case, loss: object, name: str, place: int) -> None:
    assert callable(loss)
    boxes, target = case.tensor("box_pred").requires_grad_(), case.tensor("box_target")
    rows = loss(boxes, target)
    close(rows, case.tensor(f"{name}_rows"))
    value = (rows * case.tensor("box_weight")).sum() / case.params["avg_factor"][place]
    close(value, case.tensor(f"{name}_value"))
    value.backward()
    assert boxes.grad is not None
    close(boxes.grad, case.tensor(f"grad_{name}"))
    close(1 - paired_iou(boxes, target, 1e-6).clamp(min=1e-6), case.tensor("iou_linear_rows"))


@pytest.mark.parametrize("case", PIECES)
def test_centerness_and_decoding(case: Case) -> None:
    close(centerness(case.tensor("ctr_ltrb")), case.tensor("ctr_from_ltrb"))
    entropy = F.binary_cross_entropy_with_logits(case.tensor("ctr_logits"), case.tensor("ctr_target"), reduction="sum")
    close(entropy / case.params["avg_factor"][3], case.tensor("ctr_value"), ROUNDED)
    boxes = from_distances(case.tensor("point_xy"), F.relu(case.tensor("raw_reg")) * case.tensor("stride_r")[:, None])
    close(boxes, case.tensor("decoded_rows"))
    height, width = case.tensor("clip_shape").tolist()
    limit = torch.tensor([width, height, width, height], dtype=torch.float64)
    close(torch.minimum(boxes.clamp(min=0), limit), case.tensor("decoded_clipped"))


def targets_of(case: Case, dtype: torch.dtype = torch.float64) -> Targets:
    boxes, labels, mask = padded(
        case.tensor("boxes").to(dtype), case.tensor("box_image"), case.params["N"], case.tensor("labels")
    )
    return Targets(boxes, labels, mask, torch.zeros_like(mask))


def model_of(case: Case) -> FCOS:
    p = case.params
    found = narrow(FCOS, p["C"], box_loss="iou", center_sampling=p["center_sampling"], norm_on_bbox=p["norm_on_bbox"])
    assert isinstance(found, FCOS)
    return found


@pytest.mark.parametrize("budget", [None, 1], ids=["together", "image by image"])
@pytest.mark.parametrize("case", SCENES)
def test_targets(case: Case, budget: int | None) -> None:
    p = case.params
    height, width = p["image"]
    sizes = tuple((-(-height // s), -(-width // s)) for s in p["strides"])
    assert [h * w for h, w in sizes] == case.tensor("level_count").tolist()
    grid = grid_of(sizes, p["strides"], torch.device("cpu"))
    points = grid.points
    close(points, case.tensor("points"))
    targets = targets_of(case)
    radius = p["radius"] if p["center_sampling"] else None
    match: Match = fcos_match(grid, targets, radius=radius, ranges=p["regress_ranges"], budget=budget)
    assert match.fg.sum(1).tolist() == p["num_pos"]
    labels = torch.where(match.fg, targets.labels.gather(1, match.gt.clamp(min=0)), p["C"])
    assert torch.equal(labels, case.tensor("target_label"))
    found = Positives.of(match, targets, grid, len(points))
    distances = model_of(case).distances(found)
    filled = torch.stack([found.spread(side * found.used, len(points)) for side in distances.unbind(-1)], -1)
    close(filled, case.tensor("target_ltrb"))
    close(found.spread(centerness(distances) * found.used, len(points)), case.tensor("target_centreness"))


def head_output(case: Case) -> tuple[FCOS, DenseOutput, dict[str, list[Tensor]]]:
    maps = {name: [case.tensor(n).requires_grad_() for n in case.family(name)] for name in ("cls", "reg", "centre")}
    model = model_of(case)
    out = model.assemble(Predictions(maps["cls"], maps["reg"], maps["centre"]), tuple(case.params["image"]))
    return model, out, maps


@pytest.mark.parametrize("case", LOSSES)
def test_losses_and_gradients(case: Case) -> None:
    model, out, maps = head_output(case)
    losses = task(model, out, targets_of(case))
    close(losses["cls"], case.tensor("loss_cls"))
    close(losses["box"], case.tensor("loss_bbox"))
    close(losses["center"], case.tensor("loss_centreness"), ROUNDED)
    torch.stack(list(losses.values())).sum().backward()
    for name, tensors in maps.items():
        for tensor, key in zip(tensors, case.family(f"grad_{name}"), strict=True):
            assert tensor.grad is not None
            close(tensor.grad, case.tensor(key), ROUNDED if name == "centre" else RTOL)


@pytest.mark.parametrize("case", LOSSES)
def test_giou_losses(case: Case) -> None:
    model, out, _ = head_output(case)
    model.cfg = model.cfg.model_copy(update={"box_loss": "giou"})
    close(task(model, out, targets_of(case))["box"], case.tensor("loss_bbox_giou"))


@pytest.mark.parametrize("case", LOSSES)
def test_losses_in_float32(case: Case) -> None:
    model, _, maps = head_output(case)
    single = {name: [t.detach().float() for t in tensors] for name, tensors in maps.items()}
    out = model.assemble(Predictions(single["cls"], single["reg"], single["centre"]), tuple(case.params["image"]))
    losses = task(model, out, targets_of(case, torch.float32))
    for name, key in (("cls", "loss_cls"), ("box", "loss_bbox"), ("center", "loss_centreness")):
        assert losses[name].dtype == torch.float32
        close(losses[name], case.tensor(key), 1e-4)


@pytest.mark.parametrize("case", cases("fcos", "forward"))
def test_head_network(case: Case) -> None:
    features = tuple(case.tensor(n) for n in case.family("feat"))
    weights = {n.removeprefix("w__"): case.tensor(n) for n in case.family("w")}
    settings = {
        "channels": features[0].shape[1],
        "groups": case.params["groups"],
        "stacked_convs": case.params["convs"],
    }
    model = narrow(FCOS, case.params["C"], **settings)
    model.head.load_state_dict(weights)
    model.head.double()
    height, width = features[0].shape[2:]
    out = model.on_features(features, (8 * height, 8 * width))

    def stored(name: str) -> Tensor:
        return torch.cat([case.tensor(n).flatten(2) for n in case.family(name)], 2).transpose(1, 2)

    close(out.cls_logits, stored("out_cls"))
    assert out.quality is not None
    close(out.quality, stored("out_centre")[..., 0])
    close(out.box_raw, stored("out_reg_train"), ROUNDED)
    close(out.boxes, from_distances(out.grid.points, stored("out_reg_eval")), ROUNDED)
