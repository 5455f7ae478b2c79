"""Max-IoU assignment: a prediction answers for the box that it overlaps most (Faster R-CNN, Ren et al. 2015, section 3.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from yoloxkd.nn.assigners.match import Match, image_parts, no_match, row_parts
from yoloxkd.ops import devices
from yoloxkd.ops.boxes import pairwise_iou
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Targets

TIE = 1e-5
"""Overlaps that differ by at most this part are equal: as much as float32 coordinates of a large image can be off."""


@torch.no_grad()
def max_iou_match(
    anchors: Tensor,
    targets: Targets,
    *,
    positive: float,
    negative: float,
    claim: float | None = None,
    usable: Tensor | None = None,
    budget: int | None = None,
) -> Match:
    """Match anchors or proposals to boxes by IoU: reads boxes and mask of `targets`.

    anchors   (A, 4) px, the same for every image, or (B, A, 4)
    positive  from this IoU, above 0, an anchor is positive for the box that it overlaps most, the lower row among equals
    negative  below this IoU, above 0, with every box, it is background; between the two it is ignored
    claim     a box claims the anchors that it overlaps most, all of them among equals, when that IoU is above zero and
              at least `claim`: they are positive for it, whatever else they would be. Of several boxes that claim one
              anchor, the last row gets it. None: no claims
    usable    (A,) or (B, A) bool; other anchors take no part and are ignored. None: all are
    budget    pairs (box, anchor) looked at in one go
    """
    images, rows = targets.mask.shape
    count, device = anchors.shape[-2], anchors.device
    if usable is not None:
        usable = usable.expand(images, count)
    if rows == 0:
        nothing = no_match(images, count, device)
        return nothing if usable is None else Match(nothing.fg, nothing.gt, ~usable)
    by_columns = anchors.to(full_precision(targets.boxes).dtype).mT.contiguous().mT  # each coordinate in one piece
    parts = []
    for part in image_parts(images, rows * count, device, budget):
        # of no area, and at the origin, are boxes and anchors that take no part: they overlap nothing
        boxes = full_precision(targets.boxes[part]).masked_fill(~targets.mask[part].unsqueeze(-1), 0)
        here = by_columns if by_columns.ndim == 2 else by_columns[part]
        if usable is not None:
            here = here.mT.masked_fill(~usable[part].unsqueeze(-2), 0).mT
        best, row, claimant = _scan(here, boxes, positive, claim, budget)
        fg = (best >= positive) | (claimant >= 0)
        gt = torch.where(claimant >= 0, claimant, row)
        ignored = (best >= negative) & ~fg
        if usable is not None:
            ignored |= ~usable[part]
        parts.append(Match(fg, torch.where(fg, gt, -1), ignored))
    return Match.joined(parts)


def _scan(
    anchors: Tensor, boxes: Tensor, positive: float, claim: float | None, budget: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Every anchor's largest IoU with a box, that box's row, and the last row that claims it, -1: (B, A).

    The row is right where the IoU is at least `positive`.
    """
    images, count = boxes.shape[0], anchors.shape[-2]
    best = boxes.new_full((images, count), -1.0)
    row = torch.zeros(images, count, dtype=torch.int16, device=boxes.device)
    claimant = torch.full_like(row, -1)
    for some in row_parts(boxes.shape[1], images * count, boxes.device, budget):
        overlap = pairwise_iou(boxes[:, some], anchors)
        number = torch.arange(some.start, some.stop, device=boxes.device, dtype=torch.int16).view(1, -1, 1)
        value = overlap.amax(dim=1)
        row = torch.where(value > best, _first_row(overlap, value, positive, number), row)
        best = torch.maximum(best, value)
        if claim is not None:
            top = overlap.amax(dim=2, keepdim=True)
            least = torch.where((top > 0) & (top >= claim), top * (1 - TIE), torch.inf)
            claimant = torch.maximum(claimant, torch.where(overlap >= least, number, -1).amax(dim=1))
    return best, row.long(), claimant.long()


def _first_row(overlap: Tensor, value: Tensor, positive: float, number: Tensor) -> Tensor:
    """The lowest of the numbers (1, r, 1) whose overlap (b, r, A) is the value (b, A): right where that is at least `positive`.

    A maximum with its place is several times slower than these passes. Few anchors overlap so much, and a CPU lists them.
    """
    if not devices.may_read(overlap.device):
        return torch.where(overlap == value.unsqueeze(1), number, torch.iinfo(number.dtype).max).amin(dim=1)
    at = (value >= positive).nonzero(as_tuple=True)
    columns, rows = overlap.mT[at], number.flatten()
    lowest = torch.where(columns == value[at].unsqueeze(-1), rows, torch.iinfo(rows.dtype).max).amin(dim=1)
    return torch.zeros_like(value, dtype=rows.dtype).index_put(at, lowest)
