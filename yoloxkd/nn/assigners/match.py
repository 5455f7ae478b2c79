"""Result of an assigner, and the positives gathered for the losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from yoloxkd.ops import devices
from yoloxkd.ops.losses import full_precision
from yoloxkd.ops.points import centers_inside, compact, within_content
from yoloxkd.types import Grid, Targets

BUDGET = {"cpu": 2**20, "other": 2**25}
"""Pairs (image, box, location) looked at in one go; a larger batch is taken a few images at a time."""


@dataclass(slots=True)
class Match:
    """Who answers for what. A prediction that is neither positive nor ignored is background.

    fg       (B, A) bool, positives: predictions that answer for a box
    gt       (B, A) int64, the row of `Targets` each of them answers for, -1 elsewhere
    ignored  (B, A) bool, neither positive nor background
    score    (B, A) IoU of the predicted box with that row's box, 0 elsewhere; None: the assigner has none
    """

    fg: Tensor
    gt: Tensor
    ignored: Tensor
    score: Tensor | None = None

    @classmethod
    def of(cls, fg: Tensor, gt: Tensor, score: Tensor | None = None) -> Match:
        """A match that ignores nothing."""
        return cls(fg, gt, torch.zeros_like(fg), score)

    @classmethod
    def joined(cls, parts: Sequence[Match]) -> Match:
        """The matches of parts of a batch, in their order."""
        if len(parts) == 1:
            return parts[0]
        scores = [part.score for part in parts if part.score is not None]
        return cls(
            torch.cat([part.fg for part in parts]),
            torch.cat([part.gt for part in parts]),
            torch.cat([part.ignored for part in parts]),
            torch.cat(scores) if scores else None,
        )

    def leaving_out(self, targets: Targets, grid: Grid) -> Match:
        """The same, with what lies in an ignore region or in padding ignored where it is not positive."""
        outside = centers_inside(targets.boxes, targets.ignore, grid)
        if targets.content is not None:
            outside = outside | ~within_content(grid.points, targets.content)
        return replace(self, ignored=self.ignored | (outside & ~self.fg))


def no_match(images: int, locations: int, device: torch.device) -> Match:
    """A match without positives."""
    none = torch.zeros(images, locations, dtype=torch.bool, device=device)
    return Match.of(none, torch.full_like(none, -1, dtype=torch.int64))


def image_parts(images: int, pairs: int, device: torch.device, budget: int | None = None) -> Iterator[slice]:
    """Slices of the batch axis whose (box, location) pairs, `pairs` an image, fit the budget."""
    limit = BUDGET.get(device.type, BUDGET["other"]) if budget is None else budget
    step = max(1, limit // max(pairs, 1))
    for start in range(0, images, step):
        yield slice(start, start + step)


def match_claims(candidates: Tensor, value: Tensor, real: Tensor, locations: int) -> Match:
    """What becomes of the locations that boxes want: each takes the box of the largest value, the lower row among equals.

    candidates (B, G, C) int64, C locations of each box; value (B, G, C) finite; real (B, G, C) bool, entries that count
    """
    images, rows, each = candidates.shape
    where, value, real = candidates.flatten(1), value.flatten(1), real.flatten(1)
    best = value.new_full((images, locations), -torch.inf)
    best = best.scatter_reduce(1, where, torch.where(real, value, -torch.inf), "amax")
    winner = real & (value == best.gather(1, where))
    row = torch.arange(rows, device=value.device).repeat_interleave(each).expand(images, -1)
    first = torch.full_like(best, rows, dtype=torch.int64)
    first = first.scatter_reduce(1, where, torch.where(winner, row, rows), "amin")
    fg = first < rows
    return Match.of(fg, torch.where(fg, first, -1))


def eligible(grid: Grid, targets: Targets, area: Tensor | None = None) -> Tensor:
    """Locations that can answer for a box when this follows from what they predict: (B, A) bool.

    Those in the image: `area` (B, 2) height and width px, else `targets.content`. One in an ignore region answers only
    where it lies in a box, so that what is predicted elsewhere in such a region decides nothing.
    """
    usable = ~centers_inside(targets.boxes, targets.ignore, grid)
    if not devices.may_read(usable.device) or not usable.all():
        usable |= centers_inside(targets.boxes, targets.mask, grid)
    if area is not None:
        limit = torch.cat((torch.zeros_like(area), area.flip(-1)), dim=-1)
        return usable & within_content(grid.points, limit)
    return usable if targets.content is None else usable & within_content(grid.points, targets.content)


@dataclass(slots=True)
class TwoMatches(Match):
    """A match with a second one beside it, of detectors that assign twice; `box` answers for the boxes alone."""

    box: Match = field(kw_only=True)

    @classmethod
    def beside(cls, match: Match, box: Match) -> TwoMatches:
        return cls(match.fg, match.gt, match.ignored, match.score, box=box)


def row_parts(rows: int, pairs: int, device: torch.device, budget: int | None = None) -> Iterator[slice]:
    """Slices of the box axis whose (box, location) pairs, `pairs` a row, fit the budget."""
    limit = BUDGET.get(device.type, BUDGET["other"]) if budget is None else budget
    step = max(1, limit // max(pairs, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(slots=True)
class Positives:
    """The matched locations of a batch in S slots an image, so that shapes do not depend on the data.

    cell    (B, S) int64, index of the location, 0 in unused slots
    used    (B, S) bool
    boxes   (B, S, 4) px, the box each answers for; labels (B, S) its class
    points  (B, S, 2) px; strides (B, S) px
    """

    cell: Tensor
    used: Tensor
    boxes: Tensor
    labels: Tensor
    points: Tensor
    strides: Tensor

    @classmethod
    def of(cls, match: Match, targets: Targets, grid: Grid, per_box: int) -> Positives:
        """per_box: the most locations that one box can have."""
        images, rows = targets.labels.shape
        boxes, labels = targets.boxes, targets.labels
        if rows == 0:  # one row to point at, which no slot uses
            boxes, labels, rows = boxes.new_zeros(images, 1, 4), labels.new_zeros(images, 1), 1
        cell, used = compact(match.fg, min(match.fg.shape[1], per_box * rows))
        row = match.gt.gather(1, cell).clamp(min=0)
        boxes = full_precision(boxes).gather(1, row.unsqueeze(-1).expand(-1, -1, 4))
        return cls(
            cell,
            used,
            boxes,
            labels.gather(1, row),
            grid.points[cell].to(boxes.dtype),
            grid.point_strides[cell].to(boxes.dtype),
        )

    def at(self, x: Tensor) -> Tensor:
        """(B, A, R) or (B, A) -> (B, S, R) or (B, S), at least float32."""
        index = self.cell if x.ndim == 2 else self.cell.unsqueeze(-1).expand(-1, -1, x.shape[2])
        return full_precision(x.gather(1, index))

    def total(self, x: Tensor) -> Tensor:
        """Sum of (B, S) over the used slots."""
        return x.masked_fill(~self.used, 0).sum()

    def spread(self, x: Tensor, locations: int) -> Tensor:
        """(B, S) -> (B, A), zero where no slot is."""
        target = torch.where(self.used, self.cell, locations)
        return x.new_zeros(x.shape[0], locations + 1).scatter(1, target, x)[:, :locations]


def dense_labels(match: Match, targets: Targets) -> Tensor:
    """(B, A) int64 class of the box each positive answers for; 0 elsewhere."""
    if targets.labels.shape[1] == 0:
        return torch.zeros_like(match.gt)
    return torch.where(match.fg, targets.labels.gather(1, match.gt.clamp(min=0)), 0)


def matched_boxes(match: Match, targets: Targets) -> Tensor:
    """(B, A, 4) px of the box each positive answers for, at least float32; anything elsewhere."""
    boxes = full_precision(targets.boxes)
    if boxes.shape[1] == 0:
        return boxes.new_zeros(*match.gt.shape, 4)
    return boxes.gather(1, match.gt.clamp(min=0).unsqueeze(-1).expand(-1, -1, 4))


def centerness(distances: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of positive distances left, top, right, bottom (..., 4) -> (...).

    FCOS (Tian et al. 2019), eq. 3: 1 in the middle of a box, 0 at its sides.
    """
    left, top, right, bottom = distances.unbind(-1)
    x = torch.minimum(left, right) / torch.maximum(left, right)
    y = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (x * y).sqrt()
