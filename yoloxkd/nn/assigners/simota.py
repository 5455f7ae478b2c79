"""SimOTA assigner: positives by the network's own predictions (YOLOX, Ge et al. 2021).

Per image: the candidates are the cells whose center is less than 1.5 strides, in both axes, from the center of some
box. The cost of a (box, cell) pair is the class cross entropy, plus 3 times -log(IoU), plus 1e6 when the cell is
not near this very box. Each box takes its k cheapest candidates, k being the integer part of the sum of its ten largest
IoUs, at least one. A cell taken by several boxes goes to the cheapest of all boxes for that cell.

A box is near at most 3 x 3 cells of a level, so an image with G boxes has at most 9 L G candidates. Everything here
runs on that many slots instead of all A cells, batched and with shapes that do not depend on the data.
"""

from __future__ import annotations

from operator import itemgetter

import torch
from torch import Tensor

from yoloxkd.nn.assigners.match import Match
from yoloxkd.ops.boxes import pairwise_iou
from yoloxkd.ops.losses import full_precision
from yoloxkd.ops.points import compact
from yoloxkd.types import DenseOutput, Grid, Targets

RADIUS = 1.5
"""Half side of the region around a box's center, in strides."""
IOU_WEIGHT = 3.0
FAR = 1e6
"""Cost of a cell that is not near this box: below every near cell of the image in rank, still a candidate."""
MOST = 10
"""A box gets at most this many cells."""
BUDGET = {"cpu": 2**20, "other": 2**24}
"""Pairs (image, box, candidate) looked at in one go; a larger batch is taken a few images at a time. About six float
tables of this size are alive at once; on a CPU they should stay near its caches."""


@torch.no_grad()
def simota(out: DenseOutput, targets: Targets, *, budget: int | None = None) -> Match:
    """Match cells to boxes: reads cls_logits, quality and boxes of `out`, and boxes, labels, mask and content of `targets`.

    Images without boxes, and batches with G = 0, have no positives. `budget` bounds the memory (default: BUDGET of the
    device, and at least one image); it changes nothing in the result. `out.quality` holds objectness logits. The match's
    `score` is the IoU.
    """
    assert out.quality is not None
    images, cells = out.quality.shape
    rows = targets.boxes.shape[1]
    if rows == 0:
        none = torch.zeros_like(out.quality, dtype=torch.bool)
        return Match.of(none, torch.full_like(none, -1, dtype=torch.int64), out.boxes.new_zeros(images, cells))
    slots = min(cells, 9 * len(out.grid.strides) * rows)
    if budget is None:
        budget = BUDGET.get(out.quality.device.type, BUDGET["other"])
    step = max(1, budget // (rows * slots))
    parts = []
    with torch.autocast(out.quality.device.type, enabled=False):
        for i in range(0, images, step):
            part = slice(i, i + step)
            boxes, some = full_precision(out.boxes[part]), targets.map(itemgetter(part))
            near = _near_cells(some, out.grid)
            parts.append(_match(out.cls_logits[part], out.quality[part], boxes, some, *near, slots))
    return Match.joined(parts)


def _near_cells(targets: Targets, grid: Grid) -> tuple[Tensor, Tensor]:
    """The cells near each box: index (B, G, 9 L) into A, and whether that entry is one; padding beyond `content` has none."""
    boxes, content = targets.boxes, targets.content
    center = (boxes[..., :2] + boxes[..., 2:]) / 2
    around = torch.arange(-1, 2, device=boxes.device)
    indices, valid, first = [], [], 0
    for (h, w), stride in zip(grid.sizes, grid.strides, strict=True):
        # Strictly less than 1.5 strides away leaves only the cell under the center and its direct neighbors.
        at = torch.floor(center / stride).unsqueeze(-1) + around
        close = ((at + 0.5) * stride - center.unsqueeze(-1)).abs() < RADIUS * stride
        close &= (at >= 0) & torch.stack((at[..., 0, :] < w, at[..., 1, :] < h), dim=-2)
        if content is not None:
            close &= (at + 0.5) * stride < content[:, None, 2:, None]
        x, y = at.long().unbind(-2)
        indices.append((first + y.unsqueeze(-1) * w + x.unsqueeze(-2)).flatten(-2))
        valid.append((close[..., 1, :, None] & close[..., 0, None, :]).flatten(-2))
        first += h * w
    near = torch.cat(valid, dim=-1) & targets.mask.unsqueeze(-1)
    return torch.where(near, torch.cat(indices, dim=-1), 0), near


def _match(
    logits: Tensor, quality: Tensor, boxes: Tensor, targets: Targets, near_cell: Tensor, is_near: Tensor, slots: int
) -> Match:
    """The assignment of a few images on `slots` candidates each; near_cell and is_near come from _near_cells."""
    images, cells = quality.shape
    rows = targets.boxes.shape[1]
    candidate = torch.zeros(images, cells + 1, dtype=torch.bool, device=boxes.device)
    candidate = candidate.scatter_(1, torch.where(is_near, near_cell, cells).flatten(1), True)[:, :cells]
    cell, used = compact(candidate, slots)
    slot_of_cell = (candidate.cumsum(1) - 1).clamp(min=0)
    near_slot = torch.where(is_near.flatten(1), slot_of_cell.gather(1, near_cell.flatten(1)), slots).view_as(near_cell)

    # Unused slots and padding rows get empty boxes, which overlap nothing.
    predicted = boxes.gather(1, cell.unsqueeze(-1).expand(-1, -1, 4)).masked_fill_(~used.unsqueeze(-1), 0)
    iou = pairwise_iou(targets.boxes.to(boxes.dtype).masked_fill(~targets.mask.unsqueeze(-1), 0), predicted)
    cost = _class_cost(logits, quality, cell, targets.labels) + iou.add(1e-8).log_().mul_(-IOU_WEIGHT)
    cost += iou.new_full((images, rows, slots + 1), FAR).scatter_(2, near_slot, 0)[..., :slots]
    cost.masked_fill_(~used.unsqueeze(1), torch.inf)

    most = min(MOST, slots)
    dynamic_k = iou.topk(most, dim=2).values.sum(2).long().clamp(1, most) * targets.mask
    cheapest = cost.topk(most, dim=2, largest=False)
    takes = (torch.arange(most, device=boxes.device) < dynamic_k.unsqueeze(2)) & cheapest.values.isfinite()
    taken_slots = torch.where(takes, cheapest.indices, slots).flatten(1)
    count = torch.zeros(images, slots + 1, dtype=torch.int64, device=boxes.device)
    row = count.clone()
    count = count.scatter_add_(1, taken_slots, torch.ones_like(taken_slots))[:, :slots]
    box_rows = torch.arange(rows, device=boxes.device).repeat_interleave(most).expand(images, -1)
    # Where several boxes write, any of them may win here; those cells take their cheapest box instead.
    row = torch.where(count > 1, _cheapest_near(cost, near_slot), row.scatter_(1, taken_slots, box_rows)[:, :slots])

    iou = iou.gather(1, row.unsqueeze(1)).squeeze(1)
    fg = (count > 0).gather(1, slot_of_cell) & candidate
    gt = torch.where(fg, row.gather(1, slot_of_cell), -1)
    return Match.of(fg, gt, torch.where(fg, iou.gather(1, slot_of_cell), 0))


def _cheapest_near(cost: Tensor, near_slot: Tensor) -> Tensor:
    """The cheapest of all boxes for each candidate: cost (B, G, S), near_slot (B, G, 9 L) -> row (B, S) int64.

    Every candidate is near some box, and a box that is not costs at least FAR more, so that only near pairs are looked
    at. The first row wins among equals.
    """
    images, rows, slots = cost.shape
    slot = near_slot.flatten(1)
    value = cost.gather(2, near_slot.clamp(max=slots - 1)).flatten(1)
    lowest = cost.new_full((images, slots + 1), torch.inf).scatter_reduce_(1, slot, value, "amin")
    row = torch.arange(rows, device=cost.device).repeat_interleave(near_slot.shape[2]).expand(images, -1)
    row = torch.where(value == lowest.gather(1, slot), row, rows - 1)
    best = torch.full_like(lowest, rows - 1, dtype=torch.int64)
    return best.scatter_reduce_(1, slot, row, "amin")[:, :slots]


def _class_cost(logits: Tensor, quality: Tensor, cell: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy between a box's one-hot class and sqrt(class x objectness), in float32, logs above -100.

    logits (B, A, K), quality (B, A), cell (B, S) candidates, labels (B, G) -> (B, G, S).
    The cost of every class at every candidate is the sum for "no class" plus the change at that class, so that no
    (B, G, S, K) table is built.
    """
    images, classes = logits.shape[0], logits.shape[2]
    of_cell = cell.unsqueeze(1).expand(-1, classes, -1)
    p = logits.transpose(1, 2).gather(2, of_cell).float().sigmoid_()
    p = p.mul_(quality.gather(1, cell).float().sigmoid_().unsqueeze(1)).sqrt_()
    absent = p.neg().log1p_().clamp_(min=-100)
    cost = absent.sub(p.log_().clamp_(min=-100)).sub_(absent.sum(1, keepdim=True))
    row = labels + torch.arange(images, device=labels.device).unsqueeze(1) * classes
    return cost.flatten(0, 1).index_select(0, row.flatten()).view(images, -1, cell.shape[1])
