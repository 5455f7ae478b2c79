"""Locations inside boxes: a match, and pairs for losses in which every such location has a share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yoloxkd.nn.assigners.match import Match, image_parts, no_match
from yoloxkd.ops.boxes import area
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Targets

LIST_DEVICES = ("cpu",)
"""Where the pairs are listed: elsewhere the host would have to wait for the length of the list, and all are looked at."""


def strictly_inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Which points (A, 2) lie strictly inside boxes (b, r, 4): (b, r, A) bool."""
    x, y = points.mT.contiguous().to(boxes.dtype)
    inside: Tensor = x > boxes[..., 0:1]
    return inside.logical_and_(x < boxes[..., 2:3]).logical_and_(y > boxes[..., 1:2]).logical_and_(y < boxes[..., 3:4])


@torch.no_grad()
def smallest_around(points: Tensor, targets: Targets, budget: int | None = None) -> Match:
    """Each location (A, 2) px answers for the smallest box strictly around it, the lower row among equals."""
    images, rows = targets.mask.shape
    if rows == 0:
        return no_match(images, points.shape[0], points.device)
    parts = []
    for part in image_parts(images, rows * points.shape[0], points.device, budget):
        boxes = full_precision(targets.boxes[part])
        size = area(boxes).masked_fill(~targets.mask[part], torch.inf)
        least, row = torch.where(strictly_inside(points, boxes), size.unsqueeze(-1), torch.inf).min(dim=1)
        fg = least < torch.inf
        parts.append(Match.of(fg, torch.where(fg, row, -1)))
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
    def of(cls, points: Tensor, boxes: Tensor, mask: Tensor) -> InsidePairs:
        """points (A, 2) px, boxes (b, r, 4) px, mask (b, r) bool, boxes that count."""
        return cls.where(strictly_inside(points, boxes) & mask.unsqueeze(-1))

    @classmethod
    def where(cls, inside: Tensor) -> InsidePairs:
        """The pairs for which inside (b, r, A) bool says so."""
        images, rows = inside.shape[:2]
        if inside.device.type in LIST_DEVICES:
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
