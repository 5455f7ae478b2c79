"""YOLOX (Ge et al. 2021): the official network, decoding and training losses; official checkpoints load key by key."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from yoloxkd.config.strict import Strict
from yoloxkd.nn.assigners.match import Match, Positives
from yoloxkd.nn.assigners.simota import MOST, simota
from yoloxkd.nn.blocks import ConvBlock, spatial_block
from yoloxkd.nn.dense.dense_detector import DenseDetector, Maps, Predictions
from yoloxkd.nn.detector import BoxCode, DetectorSpec, InputConvention
from yoloxkd.nn.necks.pafpn import PAFPN
from yoloxkd.ops.boxes import to_center, to_corners
from yoloxkd.ops.losses import full_precision, soft_class_loss, squared_iou_loss
from yoloxkd.types import DenseOutput, Draw, Grid, Loss, Losses, Tap, Targets, task_losses

PRIOR = 1e-2
"""The probability an untrained head gives to every class and to objectness."""
BOX_WEIGHT = 5.0
STRIDES = (8, 16, 32)


class DecoupledHead(nn.Module):
    """A 1x1 stem, a classification and a regression tower of two blocks, and three 1x1 predictors per level."""

    def __init__(self, classes: int, channels: Sequence[int], hidden: int, depthwise: bool) -> None:
        super().__init__()

        def towers() -> nn.ModuleList:
            return nn.ModuleList(
                nn.Sequential(*(spatial_block(hidden, hidden, 3, depthwise=depthwise) for _ in range(2)))
                for _ in channels
            )

        def predictors(outputs: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(hidden, outputs, 1) for _ in channels)

        self.cls_convs = towers()
        self.reg_convs = towers()
        self.cls_preds = predictors(classes)
        self.reg_preds = predictors(4)
        self.obj_preds = predictors(1)
        self.stems = nn.ModuleList(ConvBlock(c, hidden, 1) for c in channels)
        for predictor in [*self.cls_preds, *self.obj_preds]:
            nn.init.constant_(predictor.get_parameter("bias"), -math.log((1 - PRIOR) / PRIOR))


class YOLOX(DenseDetector):
    """YOLOX of any depth and width.

    Module names give the state-dict keys of the official release, in its order. Input is BGR 0..255.
    `features` of the output are the head's stems, `cls_features` and `reg_features` the first block of each tower,
    all with 256 * width channels.
    """

    class Config(Strict):
        """depth and width multiply the blocks and channels of YOLOX-L; depthwise: separable convolutions (nano)."""

        depth: float = Field(gt=0, le=4)
        width: float = Field(ge=1 / 64, le=4)
        depthwise: bool

    family = "yolox"
    class_predictors = ("head.cls_preds.",)

    def __init__(self, cfg: YOLOX.Config, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        hidden = int(256 * cfg.width)
        self.backbone = PAFPN(cfg.depth, cfg.width, cfg.depthwise)
        self.head = DecoupledHead(len(names), self.backbone.channels, hidden, cfg.depthwise)
        maps = dict.fromkeys(STRIDES, hidden)
        self.spec = DetectorSpec(
            names=tuple(names),
            strides=STRIDES,
            channels={
                Tap.BACKBONE: dict(zip(STRIDES, self.backbone.channels, strict=True)),
                Tap.NECK: maps,
                Tap.CLS: maps,
                Tap.REG: maps,
            },
            box_code=BoxCode("cells"),
            input=InputConvention(bgr=True),
            quality="objectness",
            reads_predictions=True,
        )
        self._l1 = False

    def pyramid(self, x: Tensor) -> tuple[Maps, Maps]:
        maps = self.backbone.backbone(x)
        stems = zip(self.head.stems, self.backbone.merge(maps), strict=True)
        return maps, tuple(stem(level) for stem, level in stems)

    def tower(self, branch: Tap, maps: Maps, start: int = 0, stop: int | None = None) -> Maps:
        towers = self.head.cls_convs if branch == Tap.CLS else self.head.reg_convs
        out = []
        for tower, x in zip(towers, maps, strict=True):
            for block in list(tower.children())[start:stop]:
                x = block(x)
            out.append(x)
        return tuple(out)

    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        head = self.head
        return Predictions(
            classes=[predict(x) for predict, x in zip(head.cls_preds, cls, strict=True)],
            boxes=[predict(x) for predict, x in zip(head.reg_preds, reg, strict=True)],
            quality=[predict(x) for predict, x in zip(head.obj_preds, reg, strict=True)],
        )

    def decode(self, raw: Tensor, grid: Grid) -> Tensor:
        return decode(raw, grid.points, grid.point_strides)

    def class_probability(self, out: DenseOutput) -> Tensor:
        """(B, A, K) class probability times objectness, which is what YOLOX trains its classes to mean."""
        return self.scores(out)

    def final_phase(self, on: bool) -> None:
        """Switches the L1 term of the last epochs."""
        self._l1 = on

    def assign(self, out: DenseOutput, targets: Targets, draw: Draw = Draw()) -> Match:
        return simota(out, targets).leaving_out(targets, out.grid)

    def losses(self, out: DenseOutput, targets: Targets, match: Match) -> Losses:
        """The official training losses: box, obj, cls, and l1 in the final phase.

        Each is a sum over the batch divided by the batch's number of positives (at least 1):
        box  5 (1 - IoU²) of positives
        obj  binary cross entropy of every cell, target 1 on positives. A cell whose center lies inside an ignore
             region (`targets.ignore`) or in padding (outside `targets.content`) and that is not positive is left out;
             the release knows no such regions and trains padding as background.
        cls  binary cross entropy of positives, target one-hot times the IoU with the matched box
        l1   |box_raw - code of the matched box| of positives
        """
        assert out.quality is not None
        with torch.autocast(out.quality.device.type, enabled=False):
            logits = full_precision(out.quality)
            objectness = F.binary_cross_entropy_with_logits(logits, match.fg.to(logits.dtype), reduction="none")
            terms = self._positives(out, targets, match)
            terms["obj"] = objectness.masked_fill(match.ignored, 0).sum()
            count = match.fg.sum()
            order = [name for name in ("box", "obj", "cls", "l1") if name in terms]
            return task_losses(**{name: Loss(terms[name], count) for name in order})

    def _positives(self, out: DenseOutput, targets: Targets, match: Match) -> dict[str, Tensor]:
        """Sums over positive cells, gathered into as many slots as the boxes can have positives."""
        assert match.score is not None
        positives = Positives.of(match, targets, out.grid, MOST)
        raw = positives.at(out.box_raw)
        box_loss = squared_iou_loss(decode(raw, positives.points, positives.strides), positives.boxes)
        terms = {
            "box": BOX_WEIGHT * positives.total(box_loss),
            "cls": positives.total(
                soft_class_loss(positives.at(out.cls_logits), positives.labels, positives.at(match.score))
            ),
        }
        if self._l1:
            target_code = encode(positives.boxes, positives.points, positives.strides)
            terms["l1"] = positives.total((raw - target_code).abs().sum(-1))
        return terms


def decode(raw: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """YOLOX's box code (..., N, 4) at cell centers (..., N, 2) px of strides (..., N) -> xyxy px, at least float32."""
    raw = full_precision(raw)
    stride = strides.unsqueeze(-1)
    corner = points / stride - 0.5
    return to_corners(torch.cat(((raw[..., :2] + corner) * stride, raw[..., 2:].exp() * stride), dim=-1))


def encode(boxes: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """The code (..., N, 4) that decodes to the boxes (..., N, 4) xyxy px; the logarithms take size / stride + 1e-8."""
    stride = strides.unsqueeze(-1)
    corner = points / stride - 0.5
    scaled = to_center(boxes) / stride
    return torch.cat((scaled[..., :2] - corner, (scaled[..., 2:] + 1e-8).log()), dim=-1)
