"""From a proposal network's output to the regions that the second stage looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from yoloxkd.nn.two_stage.box_code import clip
from yoloxkd.ops.constants import constant
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import DenseOutput


@dataclass(frozen=True, slots=True)
class ProposalRule:
    """How proposals are chosen.

    per_level  the best anchors of each level, before NMS
    most       proposals of an image, after it
    iou        overlap above which the worse of two boxes of a level falls
    min_size   px; a box with a smaller side falls
    score      a box with a smaller one falls
    """

    per_level: int = 1000
    most: int = 1000
    iou: float = 0.7
    min_size: float = 0.0
    score: float = 0.0


@torch.no_grad()
def propose(rpn: DenseOutput, rule: ProposalRule, areas: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The best boxes of all levels, each level's thinned by NMS.

    Waits for the device once an image, in `torchvision.ops.nms`, whose result has as many rows as boxes stay.

    Args:
        rpn: output of one class
        rule: how they are chosen
        areas: (B, 2) x, y px at which boxes are cut; None: the input's edges
    Returns:
        boxes (B, P, 4) px, scores (B, P), 0 to 1 and best first, and which of the P slots are in use, (B, P) bool;
        P is `rule.most`, or the number of anchors considered where that is smaller
    """
    logits, boxes = full_precision(rpn.cls_logits)[..., 0], full_precision(rpn.boxes)
    height, width = rpn.image_size
    if areas is None:
        areas = constant(((width, height),), boxes.dtype, boxes.device).expand(len(boxes), 2)
    scores, index, level_of = [], [], []
    for level, part in enumerate(rpn.grid.slices()):
        of_level = logits[:, part]
        best = of_level.topk(min(rule.per_level, of_level.shape[1]), dim=1)
        scores.append(best.values)
        index.append(best.indices + part.start)
        level_of.append(boxes.new_full((best.values.shape[1],), level))
    score = torch.cat(scores, 1).sigmoid()
    box = clip(boxes.gather(1, torch.cat(index, 1).unsqueeze(-1).expand(-1, -1, 4)), areas)
    if rule.score > 0:
        score = score.masked_fill(score < rule.score, -1)
    if rule.min_size > 0:
        score = score.masked_fill(((box[..., 2:] - box[..., :2]) < rule.min_size).any(-1), -1)
    plane = torch.cat(level_of)[:, None] * (2.0 * max(height, width))
    slots = min(rule.most, score.shape[1])
    rows, used = _thinned(box + plane, score, rule.iou, slots)
    return box.gather(1, rows.unsqueeze(-1).expand(-1, -1, 4)), score.gather(1, rows), used


def _thinned(boxes: Tensor, scores: Tensor, iou: float, slots: int) -> tuple[Tensor, Tensor]:
    """Rows (B, slots) that NMS keeps, best first, and whether a slot holds one; negative scores never do."""
    from torchvision.ops import nms

    rows, used = [], []
    for box, score in zip(boxes, scores, strict=True):
        # operations are counted with shapes alone: then every slot holds a proposal
        stays = torch.arange(len(box), device=box.device) if box.is_meta else nms(box, score, iou)
        rows.append(F.pad(stays, (0, slots))[:slots])
        used.append(torch.arange(slots, device=box.device) < stays.shape[0])
    index = torch.stack(rows)
    return index, torch.stack(used) & (scores.gather(1, index) >= 0)
