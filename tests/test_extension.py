"""A new method and a new detector are a class and a line of a table each: here both, and what the contracts say of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kd.contract import DistillerContract
from tests.kd.fakes import make_batch, make_state
from tests.nn.contract import FREE_SHAPES, DetectorContract
from tests.nn.fpn import SHALLOW, narrow
from yoloxkd.engine.parallel import gradients
from yoloxkd.engine.step import TrainStep
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.adapters import Adapters
from yoloxkd.kd.base import Distiller, KDConfig, Step, Teacher
from yoloxkd.kd.distillation import Distill
from yoloxkd.kd.pairing import Pairing
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.assigners.match import Match, Positives, dense_labels
from yoloxkd.nn.dense.dense_detector import DenseDetector, Maps, Predictions
from yoloxkd.nn.dense.fpn_detector import FPNConfig, FPNDetector, SharedHead
from yoloxkd.nn.dense.square_anchors import decode
from yoloxkd.nn.detector import BoxCode
from yoloxkd.ops.boxes import from_distances, pairwise_iou
from yoloxkd.ops.losses import focal_loss, full_precision, giou_loss
from yoloxkd.ops.points import within_content
from yoloxkd.types import (
    DenseOutput,
    DetectorOutput,
    Draw,
    Grid,
    Loss,
    Losses,
    LossName,
    Tap,
    Targets,
    task_losses,
)  # fmt: skip

SIDES = (3.0, 5.0)
"""Of a cell's two anchors, in strides."""


class TwoAnchorHead(SharedHead):
    def __init__(self, cfg: FPNConfig, classes: int, levels: int) -> None:
        super().__init__(cfg, levels, bias=True)
        self.cls = nn.Conv2d(cfg.channels, 2 * classes, 3, padding=1)
        self.reg = nn.Conv2d(cfg.channels, 2 * 4, 3, padding=1)
        self.initialize(self.cls)


class TwoAnchors(FPNDetector):
    """Two square anchors a cell, positives by IoU, and a third state between them and the background."""

    Config = FPNConfig
    family = "two-anchors"
    class_predictors = ("head.cls.",)
    per_cell = 2
    head: TwoAnchorHead

    def __init__(self, cfg: FPNConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.head = TwoAnchorHead(cfg, len(names), len(self.spec.strides))

    @property
    def box_code(self) -> BoxCode:
        return BoxCode("anchors")

    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        codes = [full_precision(scale(self.head.reg(x))) for scale, x in zip(self.head.scales, reg, strict=True)]
        return Predictions([self.head.cls(x) for x in cls], codes)

    def anchors(self, grid: Grid) -> Tensor:
        half = grid.point_strides.view(-1, 2) * (grid.points.new_tensor(SIDES) / 2)
        return from_distances(grid.points, half.view(-1, 1).expand(-1, 4))

    def decode(self, raw: Tensor, grid: Grid) -> Tensor:
        assert grid.anchors is not None
        return decode(raw, grid.anchors)

    @torch.no_grad()
    def assign(self, out: DenseOutput, targets: Targets, draw: Draw = Draw()) -> Match:
        assert out.grid.anchors is not None
        if targets.mask.shape[1] == 0:
            none = torch.zeros_like(out.cls_logits[..., 0], dtype=torch.bool)
            return Match.of(none, none.long() - 1).leaving_out(targets, out.grid)
        overlap = pairwise_iou(out.grid.anchors, full_precision(targets.boxes)) * targets.mask.unsqueeze(1)
        if targets.content is not None:
            overlap = overlap * within_content(out.grid.points, targets.content).unsqueeze(-1)
        best = overlap.max(2)
        nearest = (overlap == overlap.amax(1, keepdim=True)) & (
            overlap > 0
        )  # a box that no anchor fits has its best one
        fg = (best.values >= 0.5) | nearest.any(2)
        between = (best.values >= 0.4) & ~fg
        return Match(fg, torch.where(fg, best.indices, -1), between).leaving_out(targets, out.grid)

    def losses(self, out: DenseOutput, targets: Targets, match: Match) -> Losses:
        with torch.autocast(out.cls_logits.device.type, enabled=False):
            found, count = Positives.of(match, targets, out.grid, len(out.grid.points)), match.fg.sum()
            rows = focal_loss(out.cls_logits, dense_labels(match, targets), match.fg).masked_fill(match.ignored, 0)
            assert out.grid.anchors is not None
            boxes = decode(found.at(out.box_raw), out.grid.anchors[found.cell])
            box = found.total(giou_loss(boxes, found.boxes))
            return task_losses(cls=Loss(rows.sum(), count), box=Loss(box, count))


class L2(Distiller):
    """The mean squared difference of neck maps."""

    Config = KDConfig
    name = "l2"

    def __init__(self, cfg: KDConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        self.needs = frozenset({Tap.NECK})
        self.adapters = Adapters(pairing, self.needs)
        self.terms = tuple(LossName(self.name, "neck", level.stride) for level in pairing.levels)

    def compare(self, step: Step[DetectorOutput]) -> Losses:
        out: Losses = {}
        for level in self.pairing.levels:
            ours, theirs = step.maps(Tap.NECK, level)
            ours = self.adapters(ours, theirs, Tap.NECK, level)
            out[LossName(self.name, "neck", level.stride)] = Loss(F.mse_loss(ours, theirs.to(ours.dtype)))
        return out


class TestTwoAnchors(DetectorContract):
    exports = FREE_SHAPES

    def build(self, names: list[str]) -> DenseDetector:
        model: DenseDetector = narrow(TwoAnchors, names, backbone=SHALLOW)
        return model

    def test_an_anchor_between_the_thresholds_is_ignored(self) -> None:
        assert self.model.per_cell == 2
        targets = Targets(
            torch.tensor([[[8.0, 8.0, 36.0, 36.0]]]), torch.zeros(1, 1, dtype=torch.int64),
            torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool),
        )  # fmt: skip
        out = self.forward(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        match = self.model.assign(out, targets)
        assert out.grid.anchors is not None
        overlap = pairwise_iou(out.grid.anchors, targets.boxes[0])[:, 0]
        assert torch.equal(match.ignored[0], (overlap >= 0.4) & (overlap < 0.5) & ~match.fg[0])
        assert match.ignored.any()
        assert match.fg.any()


class TestL2(DistillerContract):
    kind = L2
    sees_everything = True

    def plain(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        pairs = zip((8, 16), step.student.features, step.teacher.features, strict=True)
        return {f"neck/s{stride}": ((s - t) ** 2).sum() / t.numel() for stride, s, t in pairs}


def test_two_lines_of_tables_train_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DETECTORS, "two-anchors", TwoAnchors)
    monkeypatch.setitem(DISTILLERS, "l2", L2)
    torch.manual_seed(0)
    names = ["cat", "dog", "bird"]
    student, teacher = narrow(DETECTORS["two-anchors"], names), narrow(DETECTORS["two-anchors"], names, channels=24)  # type: ignore[arg-type]
    state, said = make_state(student)
    pgd = DISTILLERS["pgd"].Config()
    distill = Distill(Teacher(teacher, "teacher.pt", "0" * 64, 1.0), {"l2": L2.Config(), "pgd": pgd})
    distill.on_setup(state)
    assert "1x1 adapter" in "\n".join(said)
    step = TrainStep(student, state.aux).train()
    optimizer = torch.optim.SGD(step.parameters(), 1e-3)
    batch = make_batch(images=4)
    found = []
    for number in range(3):
        optimizer.zero_grad()
        distill.on_batch_start(state)
        losses = gradients(step, [batch], Draw(0, number), lambda loss: loss.backward(), lambda part, terms: terms)
        optimizer.step()
        found.append(float(sum(v for name, v in losses.items() if name.source == "l2")))
    assert {str(name) for name in losses} >= {"cls", "box", "l2/neck/s8", "l2/neck/s128", "pgd/cls_fg/s8"}
    assert found[2] < found[0]
    assert all(p.grad is not None for p in step.parameters() if p.requires_grad)
