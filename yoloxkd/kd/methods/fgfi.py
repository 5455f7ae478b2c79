"""Fine-Grained Feature Imitation (FGFI, Wang et al., CVPR 2019): the neck's cells whose anchors fit an object."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.kd.adapters import AdapterKind
from yoloxkd.kd.base import KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.divergence import image_means, squared_errors, weighted_sums
from yoloxkd.kd.functional.masks import anchors_near_boxes, box_levels
from yoloxkd.kd.neck import NeckDistiller, NeckLevel, grid_of
from yoloxkd.kd.pairing import Pairing
from yoloxkd.ops.boxes import from_distances
from yoloxkd.types import DetectorOutput, Grid, Loss, Losses, LossName

LEVEL_BASE = 14
"""Strides of the finest level: the side of a box where the next level begins (56 px at stride 4 in DeFeat's release)."""
ADAPTER_STD = 1e-4
"""Initial weights of 3x3 adapters, in the release."""


class FGFIConfig(KDConfig):
    """Keys of `kd` for FGFI."""

    alpha: float = published("fgfi", "alpha", ge=0, description="weight of the mean squared error, on every level")
    threshold: float = published(
        "fgfi", "threshold", ge=0, lt=1, description="of the best overlap that any anchor has with an object (psi)"
    )
    scope: Literal["all", "each", "size"] = published(
        "fgfi",
        "scope",
        description="where an object's best anchor is sought: all levels at once, each for itself, or its size's level",
    )
    anchor_scale: float = published(
        "fgfi", "anchor_scale", gt=0, description="side, in strides, of the square anchor of detectors without anchors"
    )
    adapter: AdapterKind = published("fgfi", "adapter", description="1x1 where channels differ, or 3x3 on every level")


class FGFI(NeckDistiller):
    """FGFI on every paired level of the neck. A teacher with anchors of its own is asked by these."""

    Config = FGFIConfig
    name: ClassVar[str] = "fgfi"

    def __init__(self, cfg: FGFIConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing, cfg.adapter, ADAPTER_STD)
        if pairing.teacher.box_code.kind == "masks":
            raise UserError(
                "--kd fgfi compares cells whose anchors fit an object, and this teacher's cells are of its own grids, not of the "
                "maps; choose another teacher, or another --kd"
            )
        self.cfg = cfg
        levels = pairing.levels if cfg.alpha > 0 else ()
        self.terms = tuple(LossName(self.name, "near", level.stride) for level in levels)

    def compare(self, step: Step[DetectorOutput]) -> Losses:
        levels = list(self.levels(step))
        out: Losses = {}
        for level, weight in zip(levels, self._near(step, levels), strict=True):
            error = (
                image_means(*weighted_sums(squared_errors(level.student, level.teacher), weight))
                / level.teacher.shape[1]
            )
            out[LossName(self.name, "near", level.pair.stride)] = Loss(error * self.cfg.alpha)
        return out

    def maps(self, step: Step[DetectorOutput]) -> dict[str, Tensor]:
        """The chosen cells."""
        levels = list(self.levels(step))
        pairs = zip(levels, self._near(step, levels), strict=True)
        return {f"near an object, stride {level.pair.stride}": near.float() for level, near in pairs}

    def _near(self, step: Step[DetectorOutput], levels: list[NeckLevel]) -> list[Tensor]:
        """The chosen cells of each level: (B, h, w) bool."""
        boxes, rows = step.batch.targets.boxes, self.objects(step)
        grid = grid_of(step.teacher).of_levels([level.teacher for level in self.pairing.levels])
        anchors = self._anchors(grid, levels) if grid.anchors is None else grid.anchors
        if self.cfg.scope == "all":
            near = anchors_near_boxes(anchors, boxes, rows, self.cfg.threshold)
        else:
            box_level = box_levels(boxes, len(levels), LEVEL_BASE * self.pairing.levels[0].stride)
            parts = []
            for i, part in enumerate(grid.slices()):
                here = rows & (box_level == i) if self.cfg.scope == "size" else rows
                parts.append(anchors_near_boxes(anchors[part], boxes, here, self.cfg.threshold))
            near = torch.cat(parts, 1)
        pairs = zip(levels, grid.by_level(near), strict=True)
        return [near.any(-1) & ~level.excluded for level, near in pairs]

    def _anchors(self, grid: Grid, levels: list[NeckLevel]) -> Tensor:
        """(A, 4) px: a square at every location."""
        anchors = []
        for level, part in zip(levels, grid.slices(), strict=True):
            half = [side * self.cfg.anchor_scale / 2 for side in level.cell]
            points = grid.points[part]
            y, x = (torch.full_like(points[:, 0], side) for side in half)
            anchors.append(from_distances(points, torch.stack([x, y, x, y], -1)))
        return torch.cat(anchors)
