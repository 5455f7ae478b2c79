"""NMS inside the exported graph: the rule of `ops.nms.postprocess` with outputs of a fixed shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yoloxkd.exporters.base import Exportable
from yoloxkd.nn.solo.solo import NMS_CANDIDATES, SOLO
from yoloxkd.nn.two_stage.mask_rcnn import MaskDetector
from yoloxkd.ops.matrix_nms import decayed_scores
from yoloxkd.ops.nms import best_pairs, class_aware_nms
from yoloxkd.soft_masks import THRESHOLD

_OUT = -1.0  # score of what takes no part: below every score, and below the threshold given to NonMaxSuppression

CELLS = 112
"""Of a side of SOLO's masks in their boxes: a box of up to 448 px keeps every cell of the masks, which have stride 4."""


@torch.library.custom_op("yoloxkd::non_max_suppression", mutates_args=())
def non_max_suppression(boxes: Tensor, scores: Tensor, limit: int, iou: float) -> Tensor:
    """ONNX's NonMaxSuppression: boxes (N, A, 4), scores (N, K, A) -> (m, 3) int64 rows image, class, location.

    Negative scores take no part; at most `limit` stay of a class of an image.
    """
    rows = []
    for image, of_image in enumerate(scores):
        for label, of_class in enumerate(of_image):
            at = (of_class >= 0).nonzero()[:, 0]
            rows_of_class = at[class_aware_nms(boxes[image, at], of_class[at], torch.zeros_like(at), iou)[:limit]]
            pair = torch.tensor([image, label], device=rows_of_class.device).expand(len(rows_of_class), 2)
            rows.append(torch.cat([pair, rows_of_class[:, None]], dim=1))
    return torch.cat(rows)


@non_max_suppression.register_fake
def _(boxes: Tensor, scores: Tensor, limit: int, iou: float) -> Tensor:
    rows = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((rows, 3), dtype=torch.int64)


def onnx_translations() -> dict[Any, Any]:
    """How the exporter writes the operator above: as opset 18's NonMaxSuppression."""
    from onnxscript import opset18 as op

    def translate(boxes: Any, scores: Any, limit: int, iou: float) -> Any:
        return op.NonMaxSuppression(
            boxes,
            scores,
            op.Constant(value_ints=[limit]),
            op.Constant(value_floats=[iou]),
            op.Constant(value_floats=[_OUT / 2]),
        )

    return {torch.ops.yoloxkd.non_max_suppression.default: translate}


class WithSuppression(nn.Module):
    """An Exportable followed by the post-processing of its detector's family, every output of fixed shape.

    forward: images (N, 3, H, W) -> boxes (N, D, 4), scores (N, D), labels (N, D) int64, counts (N,) int64, and what
    they were chosen from: raw boxes (N, A, 4), raw scores (N, A, K). D is `max_det`; rows past the count are zero
    boxes, zero scores and label -1; rows are best first, the earlier location first among equals. A detector of masks
    gives them after the counts: (N, D, s, s) probabilities of the cells that a box is divided into.
    """

    def __init__(self, network: Exportable, *, conf: float, iou: float, max_det: int) -> None:
        super().__init__()
        self.network, self.conf, self.iou, self.max_det = network, conf, iou, max_det

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        out = self.network.detector(images)
        raw_boxes, scores, levels = self.network.choices(out)
        pairs_per_level = self.network.detector.spec.pairs_per_level
        if pairs_per_level is None:
            best, labels = scores.max(dim=2)
            boxes = raw_boxes
        else:
            boxes, best, labels = best_pairs(raw_boxes, scores, levels, pairs_per_level)
        admitted = torch.where(best >= self.conf, best, torch.full_like(best, _OUT))
        classes = torch.arange(scores.shape[2], device=scores.device)
        of_class = labels[:, None, :] == classes[None, :, None]
        candidates = torch.where(of_class, admitted[:, None, :], torch.full_like(admitted[:, None, :], _OUT))
        survivors = torch.ops.yoloxkd.non_max_suppression(boxes, candidates, self.max_det, self.iou)
        stays = torch.zeros_like(labels).index_put((survivors[:, 0], survivors[:, 2]), torch.ones_like(survivors[:, 0]))
        ranked = torch.where(stays > 0, admitted, torch.full_like(admitted, _OUT))
        # D rows that win against nothing, so that there are D to choose even where the input has fewer locations
        top, at = F.pad(ranked, (0, self.max_det), value=_OUT).topk(self.max_det, dim=1)
        real = top > _OUT / 2
        spare_boxes, spare_labels = F.pad(boxes, (0, 0, 0, self.max_det)), F.pad(labels, (0, self.max_det))
        top_boxes = spare_boxes.gather(1, at[:, :, None].expand(-1, -1, 4))
        top_boxes = torch.where(real[:, :, None], top_boxes, torch.zeros_like(top_boxes))
        top_labels = torch.where(real, spare_labels.gather(1, at), torch.full_like(at, -1))
        outputs = (top_boxes, torch.where(real, top, torch.zeros_like(top)), top_labels, real.sum(dim=1))
        if isinstance(self.network.detector, MaskDetector):
            masks = self.network.detector.masks(out, top_boxes, top_labels.clamp(min=0))
            outputs = (*outputs, masks * real[:, :, None, None])  # type: ignore[assignment]
        return (*outputs, raw_boxes, scores)


class WithMatrixNMS(nn.Module):
    """A SOLO, one image at a time, followed by matrix NMS, every output of fixed shape.

    forward: images (1, 3, H, W) -> boxes (1, D, 4), scores (1, D), labels (1, D) int64, counts (1,) int64, and masks
    (1, D, s, s), the probability of the cells that a box is divided into; rows past the count as in `WithSuppression`.
    """

    def __init__(self, network: Exportable, *, conf: float, max_det: int) -> None:
        super().__init__()
        assert isinstance(network.detector, SOLO)
        self.detector, self.conf, self.max_det = network.detector, conf, max_det

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        out = self.detector(images)
        soft, labels, scores = self.detector.objects_in_slots(out, 0)
        scores, order = scores.topk(min(NMS_CANDIDATES, len(scores)))
        soft, labels = soft[order], labels[order]
        inside = ((soft > THRESHOLD) & (scores > 0)[:, None, None]).to(soft.dtype)
        decayed = F.pad(decayed_scores(inside, labels, scores), (0, self.max_det))
        top, at = decayed.topk(self.max_det)
        real = (top >= self.conf) & (top > 0)
        at = at.clamp(max=len(scores) - 1)  # a row past the candidates is not real
        soft, inside = soft[at], inside[at] * real[:, None, None]
        (height, width), (h, w) = out.image_size, soft.shape[-2:]
        (y1, y2), (x1, x2) = (_extent(inside.amax(axis)) for axis in (2, 1))
        boxes = torch.stack((x1 * (width / w), y1 * (height / h), x2 * (width / w), y2 * (height / h)), 1)
        masks = (_weights(y1, y2, h) @ soft @ _weights(x1, x2, w).mT) * real[:, None, None]
        top_labels = torch.where(real, labels[at], torch.full_like(at, -1))
        outputs = (boxes, torch.where(real, top, torch.zeros_like(top)), top_labels, real.sum(), masks)
        return tuple(x.unsqueeze(0) for x in outputs)


def _extent(inside: Tensor) -> tuple[Tensor, Tensor]:
    """The first cell of a row that is 1, and the one after the last, (n, cells) -> (n,) each; zeros where none is."""
    cells = torch.arange(inside.shape[1], dtype=inside.dtype, device=inside.device)
    high = ((cells + 1) * inside).amax(1)
    return (inside.shape[1] - ((inside.shape[1] - cells) * inside).amax(1)) * (high > 0), high


def _weights(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """(n, s, cells) bilinear weights of an axis' cells at the centers of the s parts between low and high (n,), in cells."""
    at = (torch.arange(CELLS, dtype=low.dtype, device=low.device) + 0.5) / CELLS
    place = (low[:, None] + at * (high - low)[:, None] - 0.5).clamp(0, cells - 1)
    number = torch.arange(cells, dtype=low.dtype, device=low.device)
    return (1 - (place.unsqueeze(-1) - number).abs()).clamp(min=0)
