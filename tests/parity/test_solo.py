"""SOLO against the reference vectors `solo`: float64, assignments and choices exactly."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from tests.parity.vectors import Case, cases, close, padded
from yoloxkd.nn.solo.cells import assign_cells, shrunk
from yoloxkd.nn.solo.head import SOLOHead
from yoloxkd.nn.solo.solo import SOLO, SOLOOutput, cell_grid, dice_loss, local_maxima
from yoloxkd.ops.losses import focal_loss
from yoloxkd.ops.matrix_nms import matrix_nms
from yoloxkd.soft_masks import enlarged_masks
from yoloxkd.types import Targets

SMALL: dict[str, Any] = {
    "backbone": "mobilenetv2_035",
    "backbone_weights": "none",
    "frozen_stages": 0,
    "norm_eval": False,
}


@pytest.mark.parametrize("case", cases("solo", "matrix_nms"))
@pytest.mark.parametrize(("kernel", "name"), [("gaussian", "gauss"), ("linear", "linear")])
def test_solo_matrix_nms(case: Case, kernel: Literal["gaussian", "linear"], name: str) -> None:
    p = case.params
    rows, scores = matrix_nms(
        case.tensor("nms_masks"), case.tensor("nms_labels"), case.tensor("nms_scores"), candidates=p["nms_pre"],
        most=p["max_per_img"], threshold=p["filter_thr"], kernel=kernel, sigma=p["sigma"],
    )  # fmt: skip
    assert torch.equal(rows, case.tensor(f"nms_{name}_index").long())
    torch.testing.assert_close(scores, case.tensor(f"nms_{name}_score"), rtol=1e-9, atol=0)


def test_solo_no_masks() -> None:
    rows, scores = matrix_nms(torch.zeros(0, 4, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert len(rows) == len(scores) == 0


def truth(case: Case) -> Targets:
    images = case.params["N"]
    boxes, labels, mask = padded(case.tensor("boxes"), case.tensor("box_image").long(), images, case.tensor("labels"))
    masks = torch.zeros(*mask.shape, *case.params["image"], dtype=torch.bool)
    masks[mask] = case.tensor("gt_masks").bool()
    return Targets(boxes, labels.long(), mask, torch.zeros_like(mask), masks=masks)


def size_of(case: Case) -> tuple[int, int]:
    height, width = case.params["image"]
    return height, width


@pytest.mark.parametrize("case", [*cases("solo", "targets"), *cases("solo", "train")])
def test_solo_targets(case: Case) -> None:
    p, targets = case.params, truth(case)
    grid = cell_grid(p["num_grids"], size_of(case), torch.device("cpu"))
    match = assign_cells(targets, grid, p["scale_ranges"], size_of(case))
    assert targets.masks is not None
    for level, (part, stride) in enumerate(zip(grid.slices(), p["strides"], strict=True)):
        fg, gt = match.fg[:, part], match.gt[:, part]
        assert torch.equal(fg, case.tensor(f"cell_positive__{level}").bool())
        labels = torch.where(fg, targets.labels.gather(1, gt.clamp(min=0)), p["C"])
        assert torch.equal(labels, case.tensor(f"cell_label__{level}").flatten(1).long())
        image, cell = fg.nonzero(as_tuple=True)
        found = shrunk(targets.masks, stride // 2)[image, gt[image, cell]]
        assert torch.equal(found, case.tensor(f"cell_mask__{level}").bool())


@pytest.mark.parametrize("case", cases("solo", "losses"))
def test_solo_losses(case: Case) -> None:
    logits, labels = case.tensor("focal_logits").requires_grad_(), case.tensor("focal_label").long()
    positive = labels < case.params["C"]
    focal = focal_loss(logits, torch.where(positive, labels, 0), positive).sum() / (case.params["avg_factor"] + 2**-23)
    close(focal, case.tensor("focal_value"))
    focal.backward()
    assert logits.grad is not None
    close(logits.grad, case.tensor("grad_focal"))
    logits = case.tensor("dice_logits").requires_grad_()
    dice = 3 * dice_loss(logits, case.tensor("dice_target").double())
    close(dice, case.tensor("dice_rows"))
    dice.sum().backward()
    assert logits.grad is not None
    close(logits.grad, case.tensor("grad_dice"))


def detector_of(case: Case) -> SOLO:
    """A detector whose head is the one of the vectors."""
    p = case.params
    ranges = {"ranges": p["scale_ranges"]} if "scale_ranges" in p else {}
    cfg = SOLO.Config(
        **SMALL, channels=case.array("feat__0").shape[1], grids=p["num_grids"], hidden=p["channels"],
        stacked_convs=p["convs"], groups=p["groups"], **ranges,
    )  # fmt: skip
    model = SOLO(cfg, [str(i) for i in range(p["C"])]).double()
    model.mask_head.load_state_dict({name.removeprefix("w__"): case.tensor(name) for name in case.family("w")})
    return model


def output_of(case: Case, model: SOLO, features: list[torch.Tensor]) -> SOLOOutput:
    masks, logits = model.mask_head(features)
    grid = cell_grid(model.cfg.grids, size_of(case), torch.device("cpu"))
    return SOLOOutput((), tuple(features[:4]), masks, logits, grid, size_of(case))


def all_masks(head: SOLOHead, out: SOLOOutput, level: int) -> torch.Tensor:
    cells = torch.arange(head.grids[level] ** 2).expand(len(out.cls_logits), -1)
    return head.masks(level, out.mask_features[level], cells)


@pytest.mark.parametrize("case", cases("solo", "train"))
def test_solo_training(case: Case) -> None:
    """From features to losses and gradients."""
    model, targets = detector_of(case), truth(case)
    features = [case.tensor(name).requires_grad_() for name in case.family("feat")]
    out = output_of(case, model, features)
    match = model.assign(out, targets)
    for level, part in enumerate(out.grid.slices()):
        close(out.cls_logits[:, part].mT, case.tensor(f"cls__{level}").flatten(2))
        masks = all_masks(model.mask_head, out, level)
        close(masks[match.fg[:, part]], case.tensor(f"pos_mask__{level}"))
        if case.has(f"mask__{level}"):
            close(masks, case.tensor(f"mask__{level}"))
    losses = {str(name): loss.mean() for name, loss in model.losses(out, targets, match).items()}
    close(losses["mask"], case.tensor("loss_mask"))
    close(losses["cls"], case.tensor("loss_cls"), rtol=3e-7)  # the release's divisor is larger by 2^-23
    (losses["mask"] + losses["cls"]).backward()
    for leaf, name in zip(features, case.family("grad_feat"), strict=True):
        assert leaf.grad is not None
        close(leaf.grad, case.tensor(name), rtol=3e-7)
    for name, parameter in model.mask_head.named_parameters():
        assert parameter.grad is not None, name
        close(parameter.grad, case.tensor(f"grad_w__{name}"), rtol=3e-7)


@pytest.mark.parametrize("case", cases("solo", "test"))
def test_solo_from_features_to_masks(case: Case) -> None:
    model = detector_of(case)
    with torch.no_grad():
        out = output_of(case, model, [case.tensor(name) for name in case.family("feat")])
        for level, probability in enumerate(out.grid.by_level(out.cls_logits.sigmoid())):
            peaks = torch.stack([local_maxima(one) for one in probability])
            close(peaks.permute(0, 3, 1, 2), case.tensor(f"cls__{level}"))
        results_agree(case, model, out)


@pytest.mark.parametrize("case", cases("solo", "results"))
def test_solo_from_probabilities_to_masks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part alone, from probabilities that a head might give, in which no local maxima are looked for any more."""
    p = case.params
    masks = [case.tensor(name) for name in case.family("mask")]
    logits = torch.cat([case.tensor(name).flatten(2).mT for name in case.family("cls")], dim=1).logit()
    model = SOLO(SOLO.Config(**SMALL, grids=p["num_grids"]), [str(i) for i in range(p["C"])]).double()
    monkeypatch.setattr("yoloxkd.nn.solo.solo.local_maxima", lambda probability: probability.squeeze(2))
    monkeypatch.setattr(model.mask_head, "masks", lambda level, features, cells: features[:, cells[0]].logit())
    grid = cell_grid(model.cfg.grids, size_of(case), torch.device("cpu"))
    results_agree(case, model, SOLOOutput((), (), tuple(masks), logits, grid, size_of(case)))


def results_agree(case: Case, model: SOLO, out: SOLOOutput) -> None:
    """Scores, classes and masks of every image, in the order of the release."""
    p = case.params
    for i in range(p["N"]):
        soft, labels, scores = model.objects(out, i)
        rows, decayed = matrix_nms(
            soft > 0.5, labels, scores, candidates=p["nms_pre"], most=p["max_per_img"], threshold=p["filter_thr"]
        )
        own = case.tensor("det_image") == i
        close(decayed, case.tensor("det_score")[own])
        assert torch.equal(labels[rows], case.tensor("det_label")[own].long())
        content = tuple(slice(0, int(n)) for n in case.array("img_shape")[i])
        image = tuple(int(n) for n in case.array("out_shape")[i])
        found = enlarged_masks(soft[rows].numpy(), size_of(case), content, image)  # type: ignore[arg-type]
        assert torch.equal(torch.from_numpy(found), case.tensor(f"det_mask__{i}").bool())
