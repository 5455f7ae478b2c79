"""AutoAssign's losses, center prior and head against the reference vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.losses import task
from tests.nn.fpn import narrow
from tests.parity.vectors import Case, cases, padded
from yoloxkd.nn.assigners.inside import InsidePairs
from yoloxkd.nn.dense.autoassign import (
    BOX_WEIGHT,
    CENTER_WEIGHT,
    LARGEST,
    NEGATIVE_WEIGHT,
    POSITIVE_WEIGHT,
    AutoAssign,
    BoxTerms,
    CenterPrior,
    best_overlap,
    box_terms,
    lower_share,
    weighted_mean,
)
from yoloxkd.nn.dense.dense_detector import Predictions
from yoloxkd.ops.losses import giou_loss
from yoloxkd.ops.row_sums import confidence_negative, row_sums
from yoloxkd.types import DenseOutput, Grid, Targets

RTOL = 1e-9
"""Relative to the largest entry of an array."""
PIECES = cases("autoassign", "pieces")
HEADS = cases("autoassign", "head")


def close(got: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    atol = rtol * float(expected.detach().abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(got.detach(), expected.to(got.dtype), rtol=rtol, atol=atol)


@pytest.fixture(params=["list", "table"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs as on a CPU, and as on every other device."""
    if request.param == "table":
        monkeypatch.setattr("yoloxkd.ops.devices.READ_DEVICES", ())


def at_pairs(table: Tensor, pairs: InsidePairs) -> Tensor:
    """What stands at each pair of a table (P, G) of one image."""
    return table[pairs.cell, pairs.row]


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("case", PIECES)
def test_positive_loss(case: Case) -> None:
    names = ("cls_prob", "obj_prob", "reg_loss", "prior_w")
    cls, obj, reg, prior = (case.tensor(n).requires_grad_() for n in names)
    pairs = InsidePairs.where(case.tensor("inside").bool().unsqueeze(0))
    confidence = (cls * obj)[:, case.tensor("gt_label")] * (-reg).exp()
    mean = weighted_mean(at_pairs(confidence, pairs), at_pairs(prior, pairs), pairs)
    value = POSITIVE_WEIGHT * -mean.log().sum()
    close(value, case.tensor("pos_value"))
    value.backward()
    for tensor, name in ((cls, "cls"), (obj, "obj"), (reg, "reg"), (prior, "prior")):
        assert tensor.grad is not None
        expected = case.tensor(f"grad_pos_{name}")
        if name == "prior":  # the prior is zero outside, and is no variable there
            expected = expected.masked_fill(~case.tensor("inside").bool().mT, 0)
        close(tensor.grad, expected)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("case", PIECES)
def test_negative_loss(case: Case) -> None:
    cls, obj = (case.tensor(n).requires_grad_() for n in ("cls_prob", "obj_prob"))
    pairs = InsidePairs.where(case.tensor("inside").bool().unsqueeze(0))
    share = cls.new_ones(1, *cls.mT.shape)
    lower_share(share, case.tensor("iou_best").amax(1).unsqueeze(0), case.tensor("gt_label").unsqueeze(0), pairs)
    close(share[0].mT, case.tensor("neg_weight"))
    value = NEGATIVE_WEIGHT * row_sums(confidence_negative, cls.logit(), obj.logit(), share[0].mT).sum()
    close(value, case.tensor("neg_value"))
    value.backward()
    assert cls.grad is not None
    assert obj.grad is not None
    close(cls.grad, case.tensor("grad_neg_cls"))
    close(obj.grad, case.tensor("grad_neg_obj"))


@pytest.mark.parametrize("case", PIECES)
def test_box_loss(case: Case) -> None:
    boxes = case.tensor("box_pred").requires_grad_()
    rows = BOX_WEIGHT * giou_loss(boxes, case.tensor("box_target"))
    close(rows, case.tensor("giou_rows"))
    rows.sum().backward()
    assert boxes.grad is not None
    close(boxes.grad, case.tensor("grad_giou"))


def prior_of(case: Case) -> CenterPrior:
    prior = CenterPrior(case.params["C"]).double()
    prior.load_state_dict({"mean": case.tensor("mean"), "sigma": case.tensor("sigma")})
    return prior


@pytest.mark.parametrize("case", cases("autoassign", "center_prior"))
def test_center_prior(case: Case) -> None:
    prior, points, boxes = prior_of(case), case.tensor("points"), case.tensor("boxes")
    strides = torch.tensor(case.params["strides"]).repeat_interleave(case.tensor("level_count"))
    assert strides.shape == points.shape[:1]
    ends = case.tensor("level_count").cumsum(0).tolist()
    levels = [points[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    sizes = tuple((len(level[:, 1].unique()), len(level[:, 0].unique())) for level in levels)
    grid = Grid(sizes, tuple(case.params["strides"]), points, strides)
    pairs = InsidePairs.of(grid, boxes[None], torch.ones(1, len(boxes), dtype=torch.bool))
    found = torch.zeros(1, *case.tensor("inside").shape, dtype=torch.bool)
    found[pairs.image, pairs.row, pairs.cell] = True
    assert torch.equal(found[0], case.tensor("inside").bool())
    offsets = (points[pairs.cell] - (boxes[pairs.row, :2] + boxes[pairs.row, 2:]) / 2) / strides[pairs.cell, None]
    values = prior(offsets, case.tensor("labels")[pairs.row])
    close(torch.zeros_like(case.tensor("prior")).index_put((pairs.row, pairs.cell), values), case.tensor("prior"))
    (values * at_pairs(case.tensor("prior_cotangent").mT, pairs)).sum().backward()
    assert prior.mean.grad is not None
    assert prior.sigma.grad is not None
    close(prior.mean.grad, case.tensor("grad_prior_mean"))
    close(prior.sigma.grad, case.tensor("grad_prior_sigma"))


def targets_of(case: Case) -> Targets:
    boxes, labels, mask = padded(
        case.tensor("boxes"), case.tensor("box_image"), case.params["N"], case.tensor("labels")
    )
    return Targets(boxes, labels, mask, torch.zeros_like(mask))


def head_output(case: Case) -> tuple[AutoAssign, DenseOutput, dict[str, list[Tensor]]]:
    """The head's maps as one output; the stored box maps are in px, ours in strides."""
    maps = {n: [case.tensor(k).requires_grad_() for k in case.family(n)] for n in ("cls", "reg", "obj")}
    model = narrow(AutoAssign, case.params["C"])
    model.head.center_prior = prior_of(case)
    in_strides = [m / stride for m, stride in zip(maps["reg"], case.params["strides"], strict=True)]
    out = model.assemble(Predictions(maps["cls"], in_strides, maps["obj"]), tuple(case.params["image"]))
    return model, replace(out, grid=replace(out.grid, points=out.grid.points.double())), maps


def released(terms: BoxTerms, share: Tensor, out: DenseOutput, targets: Targets) -> dict[str, Tensor]:
    """The three losses as the release counts: a box without a location adds a constant and is counted."""
    assert out.quality is not None
    rows = row_sums(confidence_negative, out.cls_logits, out.quality.unsqueeze(-1), share)
    hit = -terms.confidence.clamp(min=torch.finfo(torch.float64).tiny).log().clamp(min=-LARGEST)
    hit = torch.where(terms.count > 0, hit, LARGEST).masked_fill(~targets.mask, 0)
    sums, number = terms.prior.sum(1), targets.mask.sum(1)
    center = torch.where(sums > 0, number / torch.where(sums > 0, sums, 1), 0)
    return {
        "pos": POSITIVE_WEIGHT * hit.sum() / number.sum().clamp(min=1),
        "neg": NEGATIVE_WEIGHT * rows.sum() / sums.sum().detach().clamp(min=1),
        "center": CENTER_WEIGHT * center.mean(),
    }


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("budget", [None, 1], ids=["together", "box by box"])
@pytest.mark.parametrize("case", HEADS)
def test_losses_and_gradients(case: Case, budget: int | None) -> None:
    model, out, maps = head_output(case)
    targets, prior = targets_of(case), model.head.center_prior
    assert out.quality is not None
    boxes = model.decode(out.box_raw, out.grid)
    terms, share = box_terms(out.cls_logits, out.quality, boxes, out.grid, targets, prior, budget)
    assert terms.count[targets.mask].tolist() == case.params["inside_per_box"]
    close(terms.confidence[targets.mask], case.tensor("pos_conf"))
    close(terms.prior[targets.mask], case.tensor("prior").sum(1))
    close(share, case.tensor("neg_weight"))
    losses = released(terms, share, out, targets)
    for name in losses:
        close(losses[name], case.tensor(f"loss_{name}"))
    torch.stack(list(losses.values())).sum().backward()
    for name, tensors in maps.items():
        for tensor, key in zip(tensors, case.family(f"grad_{name}"), strict=True):
            assert tensor.grad is not None
            close(tensor.grad, case.tensor(key))
    for parameter, name in ((prior.mean, "grad_mean"), (prior.sigma, "grad_sigma")):
        assert parameter.grad is not None
        close(parameter.grad, case.tensor(name))


@pytest.mark.parametrize("case", HEADS)
def test_the_detectors_losses_count_boxes_with_a_location(case: Case) -> None:
    model, out, _ = head_output(case)
    targets = targets_of(case)
    with torch.no_grad():
        losses = task(model, out, targets)
    there, image = torch.tensor(case.params["inside_per_box"]) > 0, case.tensor("box_image")
    hits = -case.tensor("pos_conf")[there].log()
    close(losses["pos"], POSITIVE_WEIGHT * hits.sum() / max(len(hits), 1))
    close(losses["neg"], case.tensor("loss_neg"))
    each = [
        there[image == i].sum() / case.tensor("prior")[image == i].sum()
        for i in range(case.params["N"])
        if there[image == i].any()
    ]
    close(losses["center"], CENTER_WEIGHT * sum(each, torch.zeros(())).double() / case.params["N"])
    if there.all():
        for name in losses:
            close(losses[name], case.tensor(f"loss_{name}"))


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("case", cases("autoassign", "limit_same_class"))
def test_boxes_of_one_class_in_any_order(case: Case) -> None:
    """Where they overlap, the release's share is that of the box written last; here it is the smallest."""
    model, out, _ = head_output(case)
    targets = targets_of(case)
    assert out.quality is not None
    said = out.cls_logits, out.quality, model.decode(out.box_raw, out.grid)
    boxes = said[2].detach()
    best = best_overlap(boxes, targets.boxes, targets.mask)
    alone = []
    for row in range(3):
        pairs = InsidePairs.of(out.grid, targets.boxes[:, [row]], targets.mask[:, [row]])
        alone.append(boxes.new_ones(1, *out.cls_logits.mT.shape[1:]))
        lower_share(alone[-1], best, targets.labels[:, [row]], pairs)
    smallest = torch.stack(alone).amin(0).mT
    for order in ([0, 1, 2], [2, 1, 0]):
        turned = Targets(*(t[:, order] for t in (targets.boxes, targets.labels, targets.mask, targets.ignore)))
        assert torch.equal(box_terms(*said, out.grid, turned, model.head.center_prior)[1], smallest)
    last = torch.stack(alone)[-1].mT  # the largest of the nested boxes, whose shares the release keeps
    close(last, case.tensor("neg_weight"))
    assert not torch.equal(torch.stack(alone)[0].mT[smallest < 1], smallest[smallest < 1])


@pytest.mark.parametrize("case", cases("autoassign", "forward"))
def test_head_network(case: Case) -> None:
    features = tuple(case.tensor(n) for n in case.family("feat"))
    settings = {
        "channels": features[0].shape[1],
        "groups": case.params["groups"],
        "stacked_convs": case.params["convs"],
    }
    model = narrow(AutoAssign, case.params["C"], **settings)
    model.head.load_state_dict({n.removeprefix("w__"): case.tensor(n) for n in case.family("w")})
    model.head.double()
    height, width = features[0].shape[2:]
    out = model.on_features(features, (8 * height, 8 * width))

    def stored(name: str) -> Tensor:
        return torch.cat([case.tensor(n).flatten(2) for n in case.family(name)], 2).transpose(1, 2)

    close(out.cls_logits, stored("out_cls"))
    close(out.box_raw * out.grid.point_strides[:, None], stored("out_reg"))
    assert out.quality is not None
    close(out.quality, stored("out_obj")[..., 0])
    height, width = case.tensor("img_shape").unbind(1)
    limit = torch.stack((width, height, width, height), 1).unsqueeze(1)
    close(torch.minimum(out.boxes.clamp(min=0), limit), case.tensor("det_box"))
    close(model.scores(out), case.tensor("det_score") * case.tensor("det_factor")[..., None])
