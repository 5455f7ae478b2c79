"""YOLOX (Ge et al. 2021): the official network, decoding and training losses; official checkpoints load key by key."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.config.strict import Strict
from yoloxkd.errors import UserError
from yoloxkd.nn.assigners.simota import MOST, SimOTAMatch, simota
from yoloxkd.nn.blocks import ConvBlock, spatial_block
from yoloxkd.nn.detector import DenseDetector, InputConvention, Taps
from yoloxkd.nn.necks import PAFPN
from yoloxkd.ops.boxes import to_centre, to_corners
from yoloxkd.ops.losses import full_precision, soft_class_loss, squared_iou_loss
from yoloxkd.ops.points import centres_inside, compact, locations, within_content
from yoloxkd.types import DenseOutput, Loss, Losses, Targets, task_losses

PRIOR = 1e-2
"""The probability an untrained head gives to every class and to objectness."""
BOX_WEIGHT = 5.0


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


def run_towers(towers: nn.ModuleList, maps: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """One tower of two blocks a level: the outputs of the first blocks, and those of the second."""
    firsts, lasts = [], []
    for tower, x in zip(towers, maps, strict=True):
        first, second = tower.children()
        firsts.append(first(x))
        lasts.append(second(firsts[-1]))
    return tuple(firsts), lasts


class YOLOX(DenseDetector):
    """YOLOX of any depth and width.

    Module names give the state-dict keys of the official release, in its order. Input is BGR 0..255.
    `features` of the output are the head's stems, `cls_features` and `reg_features` the first block of each tower,
    all with 256 * width channels.
    """

    class Config(Strict):
        """depth and width multiply the blocks and channels of YOLOX-L; depthwise: separable convolutions (nano)."""

        depth: float
        width: float
        depthwise: bool = False

    family = "yolox"
    levels = (8, 16, 32)
    input = InputConvention(bgr=True)
    class_predictors = ("head.cls_preds.",)

    def __init__(self, cfg: YOLOX.Config, names: Sequence[str]) -> None:
        super().__init__()
        hidden = int(256 * cfg.width)
        self.cfg = cfg
        self.names = list(names)
        self.backbone = PAFPN(cfg.depth, cfg.width, cfg.depthwise)
        self.head = DecoupledHead(len(self.names), self.backbone.channels, hidden, cfg.depthwise)
        maps = (hidden,) * len(self.levels)
        self.taps = Taps(maps, maps, maps)
        self._l1 = False

    def dense(self, x: Tensor) -> DenseOutput:
        """The network on BGR 0..255 (B, 3, H, W); H and W must be multiples of 32."""
        height, width = x.shape[-2:]
        if height % self.levels[-1] or width % self.levels[-1]:
            raise UserError(
                f"YOLOX got an image of {height}x{width} (height x width), but both must be multiples of "
                f"{self.levels[-1]}; letterbox it or choose another imgsz."
            )
        head = self.head
        features = tuple(stem(level) for stem, level in zip(head.stems, self.backbone(x), strict=True))
        cls_features, cls_last = run_towers(head.cls_convs, features)
        reg_features, reg_last = run_towers(head.reg_convs, features)
        return self.assemble(
            [predict(f) for predict, f in zip(head.reg_preds, reg_last, strict=True)],
            [predict(f) for predict, f in zip(head.obj_preds, reg_last, strict=True)],
            [predict(f) for predict, f in zip(head.cls_preds, cls_last, strict=True)],
            features,
            cls_features,
            reg_features,
        )

    def assemble(
        self,
        box: Sequence[Tensor],
        objectness: Sequence[Tensor],
        classes: Sequence[Tensor],
        features: tuple[Tensor, ...] = (),
        cls_features: tuple[Tensor, ...] = (),
        reg_features: tuple[Tensor, ...] = (),
    ) -> DenseOutput:
        """The head's raw maps as one DenseOutput.

        Per level, finest first: box (B, 4, h, w) code tx, ty, tw, th; objectness (B, 1, h, w) and classes (B, K, h, w)
        logits. Cell (row i, column j) of stride s decodes to centre ((tx + j) s, (ty + i) s) and size (e^tw s, e^th s),
        in float32 even under autocast.
        """

        def flat(maps: Sequence[Tensor]) -> Tensor:
            return torch.cat([m.flatten(2) for m in maps], dim=2).transpose(1, 2)

        sizes = tuple((m.shape[2], m.shape[3]) for m in box)
        points, strides = locations(sizes, self.levels, box[0].device)
        raw = flat(box)
        return DenseOutput(
            features=features,
            cls_features=cls_features,
            reg_features=reg_features,
            cls_logits=flat(classes),
            box_raw=raw,
            boxes=decode(raw, points, strides),
            quality=flat(objectness).squeeze(-1),
            points=points,
            strides=strides,
            sizes=sizes,
            levels=self.levels,
            image_size=(sizes[0][0] * self.levels[0], sizes[0][1] * self.levels[0]),
        )

    def scores(self, out: DenseOutput) -> Tensor:
        """(B, A, K) class probability times objectness."""
        assert out.quality is not None
        return full_precision(out.cls_logits).sigmoid() * full_precision(out.quality).sigmoid().unsqueeze(-1)

    def class_probability(self, out: DenseOutput) -> Tensor:
        """(B, A, K) class probability times objectness, which is what YOLOX trains its classes to mean."""
        return self.scores(out)

    def final_phase(self, on: bool) -> None:
        """Switches the L1 term of the last epochs."""
        self._l1 = on

    def losses(self, out: DenseOutput, targets: Targets) -> Losses:
        """The official training losses: box, obj, cls, and l1 in the final phase.

        Each is a sum over the batch divided by the batch's number of positives (at least 1):
        box  5 (1 - IoU²) of positives
        obj  binary cross entropy of every cell, target 1 on positives. A cell whose centre lies inside an ignore
             region (`targets.ignore`) or in padding (outside `targets.content`) and that is not positive is left out;
             the release knows no such regions and trains padding as background.
        cls  binary cross entropy of positives, target one-hot times the overlap with the matched box
        l1   |box_raw - code of the matched box| of positives
        """
        assert out.quality is not None
        with torch.autocast(out.quality.device.type, enabled=False):
            match = simota(out, targets)
            positives = match.fg.sum()
            terms = {"obj": self._objectness(out, targets, match), **self._positives(out, targets, match)}
            order = [name for name in ("box", "obj", "cls", "l1") if name in terms]
            return task_losses(**{name: Loss(terms[name], positives) for name in order})

    def _objectness(self, out: DenseOutput, targets: Targets, match: SimOTAMatch) -> Tensor:
        assert out.quality is not None
        logits = full_precision(out.quality)
        loss = F.binary_cross_entropy_with_logits(logits, match.fg.to(logits.dtype), reduction="none")
        ignored = centres_inside(targets.boxes, targets.ignore, out.sizes, out.levels)
        if targets.content is not None:
            ignored = ignored | ~within_content(out.points, targets.content)
        return loss.masked_fill(ignored & ~match.fg, 0).sum()

    def _positives(self, out: DenseOutput, targets: Targets, match: SimOTAMatch) -> dict[str, Tensor]:
        """Sums over positive cells, gathered into as many slots as the boxes can have positives."""
        cell, used = compact(match.fg, min(match.fg.shape[1], MOST * targets.boxes.shape[1]))
        rows = match.gt.gather(1, cell).clamp(min=0)

        def at_cells(x: Tensor) -> Tensor:
            return x.gather(1, cell.unsqueeze(-1).expand(-1, -1, x.shape[2]))

        def total(x: Tensor) -> Tensor:
            return x.masked_fill(~used, 0).sum()

        raw = full_precision(at_cells(out.box_raw))
        points, strides = out.points[cell], out.strides[cell]
        boxes = targets.boxes.to(raw.dtype).gather(1, rows.unsqueeze(-1).expand(-1, -1, 4))
        labels = targets.labels.gather(1, rows)
        logits = full_precision(at_cells(out.cls_logits))
        terms = {
            "box": BOX_WEIGHT * total(squared_iou_loss(decode(raw, points, strides), boxes)),
            "cls": total(soft_class_loss(logits, labels, match.iou.gather(1, cell))),
        }
        if self._l1:
            terms["l1"] = total((raw - encode(boxes, points, strides)).abs().sum(-1))
        return terms


def decode(raw: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """YOLOX's box code (..., N, 4) at cell centres (..., N, 2) px of strides (..., N) -> xyxy px, at least float32."""
    raw = full_precision(raw)
    stride = strides.unsqueeze(-1)
    corner = points / stride - 0.5
    return to_corners(torch.cat(((raw[..., :2] + corner) * stride, raw[..., 2:].exp() * stride), dim=-1))


def encode(boxes: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """The code (..., N, 4) that decodes to the boxes (..., N, 4) xyxy px; the logarithms take size / stride + 1e-8."""
    stride = strides.unsqueeze(-1)
    corner = points / stride - 0.5
    scaled = to_centre(boxes) / stride
    return torch.cat((scaled[..., :2] - corner, (scaled[..., 2:] + 1e-8).log()), dim=-1)
