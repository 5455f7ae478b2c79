"""SOLO (Wang et al. 2020): instance masks by locations, without boxes or proposals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from yoloxkd.nn.assigners.match import Match
from yoloxkd.nn.detector import BoxCode, Detector, DetectorSpec
from yoloxkd.nn.necks.pooled_fpn import PooledFPN, with_pooled
from yoloxkd.nn.pyramid import PyramidConfig, build_backbone, start_backbone
from yoloxkd.nn.solo.cells import assign_cells, masks_of, shrunk
from yoloxkd.nn.solo.head import SOLOHead
from yoloxkd.ops.losses import focal_loss, full_precision
from yoloxkd.ops.matrix_nms import matrix_nms
from yoloxkd.ops.nms import NMS
from yoloxkd.ops.points import compact, grid_of
from yoloxkd.soft_masks import THRESHOLD, FrameMasks, extents
from yoloxkd.types import Detections, Draw, Grid, Loss, Losses, Tap, Targets, task_losses

STRIDES = (4, 8, 16, 32)
LEVEL_STRIDES = (8, 8, 16, 32, 32)
"""px of the maps that each level's masks are made of; the masks are twice as fine."""
CELLS_OF_AN_OBJECT = 9
"""At most, at one level."""
DICE_WEIGHT = 3.0
DICE_LEAST = 0.001
NMS_CANDIDATES = 500
"""Masks that matrix NMS looks at (published configuration)."""


class SOLOConfig(PyramidConfig):
    """Keys of SOLO; the defaults are the published ones."""

    hidden: int = Field(256, ge=1, le=4096, description="channels of the towers")
    stacked_convs: int = Field(7, ge=1, le=64, description="3x3 convolutions of a tower")
    groups: int = Field(32, ge=1, description="of the towers' group norms")
    grids: tuple[int, int, int, int, int] = Field((40, 36, 24, 16, 12), description="cells of a side of each level")
    ranges: tuple[tuple[float, float], ...] = Field(
        ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048)),
        min_length=5,
        max_length=5,
        description="px, square root of the area of the boxes that each level learns",
    )
    score_threshold: float = Field(0.1, ge=0, lt=1, description="class probability above which a cell is looked at")
    pairs: int = Field(1000, ge=1, description="most probable pairs of a cell and a class that are looked at")


@dataclass(slots=True)
class SOLOOutput:
    """Everything SOLO says about a batch.

    Attributes:
        backbone_features, features: maps of strides 4 to 32
        mask_features: L x (B, C, h, w), what the masks of a level's cells are made of
        cls_logits: (B, A, K) of all levels' cells
        grid: of the cells; SOLO's own S x S at every level
        image_size: (H, W)
    """

    backbone_features: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    mask_features: tuple[Tensor, ...]
    cls_logits: Tensor
    grid: Grid
    image_size: tuple[int, int]


class SOLO(Detector[SOLOOutput, Match]):
    """SOLO on any timm backbone: the undecoupled head of the first paper."""

    Config = SOLOConfig
    family = "solo"
    class_predictors = ("mask_head.conv_cls.",)
    trains_without_masks = False
    channels_last_on_cpu = False

    cfg: SOLOConfig

    def __init__(self, cfg: SOLOConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.backbone = build_backbone(cfg, STRIDES)
        self.neck = PooledFPN(self.backbone.channels, cfg.channels)
        self.mask_head = SOLOHead(
            cfg.channels, len(names), cfg.grids, hidden=cfg.hidden, convs=cfg.stacked_convs, groups=cfg.groups
        )
        self.spec = DetectorSpec(
            names=tuple(names),
            strides=STRIDES,
            channels={
                Tap.BACKBONE: dict(zip(STRIDES, self.backbone.channels, strict=True)),
                Tap.NECK: dict.fromkeys(STRIDES, cfg.channels),
            },
            box_code=BoxCode("masks"),
            input=cfg.convention(),
            stable_locations=False,
            masks=True,
        )

    def pretrain(self) -> str | None:
        """Start the backbone from published weights. One that starts untrained trains whole: nothing of it is frozen."""
        self.cfg, note = start_backbone(self.backbone, self.cfg)
        return note

    def network(self, x: Tensor) -> SOLOOutput:
        height, width = x.shape[-2:]
        self.check_size(height, width)
        backbone = tuple(self.backbone(x))
        features = self.neck(backbone)
        mask_features, logits = self.mask_head(with_pooled(features))
        grid = cell_grid(self.cfg.grids, (height, width), x.device)
        return SOLOOutput(backbone, features, mask_features, logits, grid, (height, width))

    def assign(self, out: SOLOOutput, targets: Targets, draw: Draw = Draw()) -> Match:
        """The cells that answer for objects; see `assign_cells`."""
        return assign_cells(targets, out.grid, self.cfg.ranges, out.image_size)

    def losses(self, out: SOLOOutput, targets: Targets, match: Match) -> Losses:
        """`cls`, the focal loss of all cells divided by the number of positives and one; `mask`, the dice loss of positives.

        Masks are computed for positive cells alone, in as many slots as there can be: nine an object and level; on a CPU,
        which never waits, in as many as there are.
        """
        with torch.autocast(out.cls_logits.device.type, enabled=False):
            labels = (
                targets.labels.gather(1, match.gt.clamp(min=0)) if targets.labels.shape[1] else match.gt.clamp(min=0)
            )
            focal = focal_loss(out.cls_logits, labels, match.fg).masked_fill(match.ignored, 0).sum()
            positives = match.fg.sum()
            dice = torch.stack([self._dice(level, out, targets, match) for level in range(len(self.cfg.grids))]).sum()
            sums = torch.stack((focal, positives.to(focal.dtype)))
            return task_losses(
                cls=Loss(torch.ones_like(focal), sums, of=lambda whole: whole[0] / (whole[1] + 1)),
                mask=Loss(dice * DICE_WEIGHT, positives),
            )

    def _dice(self, level: int, out: SOLOOutput, targets: Targets, match: Match) -> Tensor:
        """The sum of the dice losses of a level's positive cells."""
        part = out.grid.slices()[level]
        fg, gt = match.fg[:, part], match.gt[:, part]
        slots = min(fg.shape[1], CELLS_OF_AN_OBJECT * targets.mask.shape[1])
        if fg.device.type == "cpu":
            slots = int(fg.sum(1).amax())
        cell, used = compact(fg, max(1, slots))
        logits = self.mask_head.masks(level, out.mask_features[level], cell)
        target_masks = torch.zeros_like(logits)
        if targets.mask.shape[1]:
            masks = shrunk(masks_of(targets), LEVEL_STRIDES[level] // 2)
            image = torch.arange(len(masks), device=masks.device).unsqueeze(1)
            target_masks = masks[image, gt.gather(1, cell).clamp(min=0)].to(logits.dtype)
        return dice_loss(logits, target_masks).masked_fill(~used, 0).sum()

    def candidates(self, out: SOLOOutput) -> tuple[Tensor, Tensor]:
        """The most probable pairs of a cell and a class as boxes around their masks, and scores of one class each."""
        boxes, scores = [], []
        for i in range(len(out.cls_logits)):
            soft, labels, score = self.objects(out, i)
            box = torch.from_numpy(extents((soft > THRESHOLD).cpu().numpy())).to(score) * self._cell_size(out, soft)
            row = score.new_zeros(len(score), len(self.names)).scatter(1, labels.unsqueeze(1), score.unsqueeze(1))
            boxes.append(F.pad(box, (0, 0, 0, self.cfg.pairs - len(box))))
            scores.append(F.pad(row, (0, 0, 0, self.cfg.pairs - len(row))))
        return torch.stack(boxes), torch.stack(scores)

    @torch.no_grad()
    def detect(self, out: SOLOOutput, nms: NMS) -> list[Detections]:
        """The detections that matrix NMS leaves of each image, with `soft_masks`; it has no overlap to set (`nms.iou`)."""
        detections = []
        for i in range(len(out.cls_logits)):
            soft, labels, scores = self.objects(out, i)
            rows, decayed = matrix_nms(
                soft > THRESHOLD, labels, scores, candidates=NMS_CANDIDATES, most=nms.max_det, threshold=nms.conf
            )
            masks = soft[rows].float().cpu().numpy()
            size = self._cell_size(out, soft).cpu().numpy()
            detections.append(
                Detections(
                    (extents(masks > THRESHOLD) * size).astype("float32"), decayed.float().cpu().numpy(),
                    labels[rows].cpu().numpy(), self.names, soft_masks=FrameMasks(masks, out.image_size),
                )
            )  # fmt: skip
        return detections

    def _cell_size(self, out: SOLOOutput, soft: Tensor) -> Tensor:
        """(4,) px of a cell of masks (n, h, w), x, y, x, y."""
        (height, width), (h, w) = out.image_size, soft.shape[-2:]
        return torch.tensor([width / w, height / h] * 2, dtype=torch.float64).to(soft)

    def objects(self, out: SOLOOutput, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """Masks (n, h, w), 0 to 1, at stride 4, classes (n,) and scores (n,) of an image's cells before matrix NMS.

        A cell counts where its class probability is the largest of the 2 x 2 cells that end at it, and where its mask has
        more cells than the level's stride has px; its score is that probability times the mask's mean.
        """
        value, cell, labels = self._pairs(out, image)
        confident = value > self.cfg.score_threshold
        value, cell, labels = value[confident], cell[confident], labels[confident]
        soft = out.mask_features[0].new_zeros(len(cell), *out.mask_features[0].shape[-2:], dtype=value.dtype)
        stride = torch.zeros_like(value)
        for level, part in enumerate(out.grid.slices()):
            rows = ((cell >= part.start) & (cell < part.stop)).nonzero()[:, 0]
            if len(rows):
                soft[rows] = self._soft_masks(out, image, level, cell[rows] - part.start)
                stride[rows] = LEVEL_STRIDES[level]
        score, large = scored(soft, value, stride)
        return soft[large], labels[large], score[large]

    def objects_in_slots(self, out: SOLOOutput, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `objects`, with as many rows for every image, as a graph of fixed shapes needs; unused ones have a score of zero.

        Every level is asked for the masks of all rows.
        """
        value, cell, labels = self._pairs(out, image)
        soft = out.mask_features[0].new_zeros(len(cell), *out.mask_features[0].shape[-2:], dtype=value.dtype)
        stride = torch.zeros_like(value)
        for level, part in enumerate(out.grid.slices()):
            here = (cell >= part.start) & (cell < part.stop)
            of_level = self._soft_masks(out, image, level, (cell - part.start).clamp(0, part.stop - part.start - 1))
            soft = torch.where(here[:, None, None], of_level, soft)
            stride = torch.where(here, torch.full_like(stride, LEVEL_STRIDES[level]), stride)
        score, large = scored(soft, value, stride)
        return soft, labels, torch.where(large & (value > self.cfg.score_threshold), score, torch.zeros_like(score))

    def _pairs(self, out: SOLOOutput, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """The most probable pairs of a cell and a class of an image: probabilities, cells and classes, (n,) each."""
        peaks = [local_maxima(x[image]) for x in out.grid.by_level(full_precision(out.cls_logits).sigmoid())]
        classes = out.cls_logits.shape[-1]
        probability = torch.cat([peak.flatten() for peak in peaks])
        best = probability.topk(min(self.cfg.pairs, len(probability)))
        return best.values, best.indices.div(classes, rounding_mode="floor"), best.indices.remainder(classes)

    def _soft_masks(self, out: SOLOOutput, image: int, level: int, cells: Tensor) -> Tensor:
        """Masks (n, h, w), 0 to 1, at stride 4, of cells (n,) of a level."""
        logits = self.mask_head.masks(level, out.mask_features[level][image : image + 1], cells[None])
        size = out.mask_features[0].shape[-2:]
        return F.interpolate(logits.sigmoid(), size=size, mode="bilinear")[0]


def scored(soft: Tensor, value: Tensor, stride: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (n,) of masks (n, h, w), the classes' probability (n,) times the mask's mean, and whether they are large enough."""
    inside = soft > THRESHOLD
    area = inside.sum((1, 2))
    return value * (soft * inside).sum((1, 2)) / area.clamp(min=1), area > stride


def cell_grid(grids: Sequence[int], image_size: tuple[int, int], device: torch.device) -> Grid:
    """The centers of S x S cells over an input of image_size (H, W) px, for every S of `grids`."""
    height, width = image_size
    steps = [(height / cells, width / cells) for cells in grids]
    return grid_of([(cells, cells) for cells in grids], LEVEL_STRIDES, device, steps=steps)


def local_maxima(probability: Tensor) -> Tensor:
    """Probabilities (S, S, 1, K), zero where a cell above, on the left or above left has a larger one: (S, S, K)."""
    x = probability.squeeze(2).permute(2, 0, 1)
    largest = F.max_pool2d(x.unsqueeze(0), 2, stride=1, padding=1)[0, :, :-1, :-1]
    return (x * (largest == x)).permute(1, 2, 0)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - 2 sum(p t) / (sum(p^2) + sum(t^2)) of masks (..., h, w), logits and 0 or 1: (...) (Wang et al. 2020, eq. 4)."""
    p, t = full_precision(logits).sigmoid().flatten(-2), target.flatten(-2)
    return 1 - 2 * (p * t).sum(-1) / ((p * p).sum(-1) + (t * t).sum(-1) + 2 * DICE_LEAST)
