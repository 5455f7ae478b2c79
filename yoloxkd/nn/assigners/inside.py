"""Locations inside boxes: a match, and pairs for losses in which every such location has a share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yoloxkd.nn.assigners.match import Match, image_parts, no_match
from yoloxkd.ops import devices
from yoloxkd.ops.boxes import area
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Grid, Targets


def inside(grid: Grid, boxes: Tensor, margin: float = 0.0) -> Tensor:
    """Which locations lie in which boxes (B, G, 4) px, further than `margin` px from every side: (B, G, A) bool.

    Row by row and column by column of each level, whose locations form a lattice.
    """
    x1, y1, x2, y2 = boxes.unsqueeze(-1).unbind(-2)
    parts = []
    for (h, w), here in zip(grid.sizes, grid.slices(), strict=True):
        points = grid.points[here].to(boxes.dtype).view(h, w, 2)
        x, y = points[0, :, 0], points[:, 0, 1]
        columns = torch.minimum(x - x1, x2 - x) > margin
        lines = torch.minimum(y - y1, y2 - y) > margin
        parts.append((lines.unsqueeze(-1) & columns.unsqueeze(-2)).flatten(2))
    return torch.cat(parts, dim=-1)


def _counting(boxes: Tensor, mask: Tensor) -> Tensor:
    """Boxes (B, G, 4) with those that do not count where no location is."""
    return boxes.masked_fill(~mask.unsqueeze(-1), torch.inf)


@torch.no_grad()
def smallest_around(grid: Grid, targets: Targets, budget: int | None = None) -> Match:
    """Each location answers for the smallest box strictly around it, the lower row among equals."""
    images, rows = targets.mask.shape
    locations, device = grid.points.shape[0], grid.points.device
    if rows == 0:
        return no_match(images, locations, device)
    parts = []
    for part in image_parts(images, rows * locations, device, budget):
        boxes = _counting(full_precision(targets.boxes[part]), targets.mask[part])
        order = area(boxes).argsort(dim=1, stable=True)
        # ranks in place of sizes: a minimum of small integers, which needs no place beside it
        rank = order.argsort(dim=1).to(torch.int16)
        least = torch.where(inside(grid, boxes), rank.unsqueeze(-1), rows).amin(dim=1)
        fg = least < rows
        parts.append(Match.of(fg, torch.where(fg, order.gather(1, least.clamp(max=rows - 1).long()), -1)))
    return Match.joined(parts)


@dataclass(slots=True)
class InsidePairs:
    """The pairs of some boxes (b, r) and the locations strictly inside them.

    image, row, cell  int64 indices of the pairs, of shapes that broadcast to one shape S: (P,) of a list of pairs, or
                      (b, r, A) of all of them
    inside            (b, r, A) bool, which of all pairs are; None: `owner` is given
    owner             (P,) int64, image * r + row, of a list
    """

    image: Tensor
    row: Tensor
    cell: Tensor
    inside: Tensor | None
    owner: Tensor | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, grid: Grid, boxes: Tensor, mask: Tensor) -> InsidePairs:
        """boxes (b, r, 4) px, mask (b, r) bool, boxes that count."""
        return cls.where(inside(grid, _counting(boxes, mask)))

    @classmethod
    def where(cls, inside: Tensor) -> InsidePairs:
        """The pairs for which inside (b, r, A) bool says so."""
        images, rows = inside.shape[:2]
        if inside.device.type in devices.READ_DEVICES:
            image, row, cell = inside.nonzero(as_tuple=True)
            return cls(image, row, cell, None, image * rows + row, (images, rows))
        image, row, cell = (torch.arange(n, device=inside.device) for n in inside.shape)
        return cls(image.view(-1, 1, 1), row.view(1, -1, 1), cell.view(1, 1, -1), inside, None, (images, rows))

    def total(self, x: Tensor) -> Tensor:
        """Sum of (S) over the locations of each box: (b, r)."""
        if self.owner is None:
            assert self.inside is not None
            return torch.where(self.inside, x, 0).sum(-1)
        return x.new_zeros(self._boxes).index_add(0, self.owner, x).view(self.shape)

    def lowest(self, x: Tensor) -> Tensor:
        """Smallest (S) of the locations of each box: (b, r), infinity without any."""
        if self.owner is None:
            assert self.inside is not None
            return torch.where(self.inside, x, torch.inf).amin(-1)
        return x.new_full((self._boxes,), torch.inf).scatter_reduce(0, self.owner, x, "amin").view(self.shape)

    def spread(self, x: Tensor) -> Tensor:
        """What belongs to each box (b, r), at its locations: of a shape that broadcasts to S."""
        return x.unsqueeze(-1) if self.owner is None else x.flatten().index_select(0, self.owner)

    def where_inside(self, x: Tensor, other: float) -> Tensor:
        """(S) with `other` at pairs whose location is not inside."""
        return x if self.inside is None else torch.where(self.inside, x, other)

    @property
    def _boxes(self) -> int:
        return self.shape[0] * self.shape[1]
