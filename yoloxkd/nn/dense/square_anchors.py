"""Base class of detectors with one square anchor a location, ATSS and DDOD: where it lies, and its box code."""

from __future__ import annotations

from torch import Tensor, nn

from yoloxkd.nn.assigners.atss import square_anchors
from yoloxkd.nn.dense.dense_detector import Maps
from yoloxkd.nn.dense.fpn_detector import LEVELS, FPNConfig, FPNDetector, SharedHead
from yoloxkd.nn.detector import BoxCode
from yoloxkd.ops.boxes import from_deltas, to_deltas
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Grid

BOX_WEIGHT = 2.0
DEVIATIONS = (0.1, 0.1, 0.2, 0.2)
"""The box code is divided by these: it has about unit variance then."""


class SquareAnchorHead(SharedHead):
    """The towers, a factor a level, and the 3x3 predictors of classes and boxes; a subclass adds that of the quality."""

    def __init__(self, cfg: FPNConfig, classes: int, *, bias: bool) -> None:
        super().__init__(cfg, len(LEVELS), bias=bias)
        self.atss_cls = nn.Conv2d(cfg.channels, classes, 3, padding=1)
        self.atss_reg = nn.Conv2d(cfg.channels, 4, 3, padding=1)

    def codes(self, reg: Maps) -> list[Tensor]:
        """Box codes of all levels, (B, 4, h, w) each, float32 at least."""
        return [full_precision(scale(self.atss_reg(x))) for scale, x in zip(self.scales, reg, strict=True)]


class SquareAnchorDetector(FPNDetector):
    """Locations are the corners of the cells, where the anchors have their centers.

    `box_raw` of the output holds the shift of the center in anchor sides and the logarithm of the size in anchor sides,
    divided by `DEVIATIONS`.
    """

    class_predictors = ("head.atss_cls.",)
    quality = "localization"
    offset = 0.0
    deviations = DEVIATIONS

    head: SquareAnchorHead

    @property
    def box_code(self) -> BoxCode:
        return BoxCode("anchors")

    def anchors(self, grid: Grid) -> Tensor:
        return square_anchors(grid.points, grid.point_strides)

    def decode(self, raw: Tensor, grid: Grid) -> Tensor:
        assert grid.anchors is not None
        return decode(raw, grid.anchors)


def decode(raw: Tensor, anchors: Tensor) -> Tensor:
    """The box code (..., N, 4) at anchors (..., N, 4) px -> xyxy px, at least float32."""
    return from_deltas(full_precision(raw), anchors, DEVIATIONS)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """The code (..., N, 4) that decodes to boxes (..., N, 4) xyxy px at anchors (..., N, 4) px."""
    return to_deltas(boxes, anchors, DEVIATIONS)
