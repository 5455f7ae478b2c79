"""Which regions train: drawn at random, but the same whenever seed, step and image are the same."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from yoloxkd.nn.assigners.match import Match
from yoloxkd.types import Draw, Targets

_LOW = 0xFFFFFFFF


class Stream(IntEnum):
    """What is drawn: further stages of a cascade count on from ROI."""

    RPN = 0
    ROI = 1


def _hashed(x: Tensor) -> Tensor:
    """A permutation of the integers 0 .. 2^32 - 1 without visible order (two rounds of multiply and shift)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & _LOW
    return x ^ (x >> 16)


def random_keys(draw: Draw, stream: int, images: int, count: int, device: torch.device) -> Tensor:
    """(B, count) int64, different within an image, from 0 to 2^32 - 1: in their order things are drawn.

    They follow from the seed, the step, the stream and the number of the image in the step's whole batch (`draw.place`),
    and so do not depend on the device or on how the batch is divided.
    """
    first, every = draw.place
    key = torch.arange(images, device=device) * every + first
    for value in (draw.number, draw.seed, stream):
        key = _hashed(key ^ (value & _LOW))
    return _hashed((key[:, None] + torch.arange(count, device=device)) & _LOW)


def sample(match: Match, count: int, positive_share: float, keys: Tensor) -> Match:
    """At most `count` regions an image, at most that share of them positive, the rest background; all others are ignored.

    keys (B, R) int64: those with the largest ones are taken.
    """
    regions = keys.shape[1]
    background = ~match.fg & ~match.ignored
    most = min(int(count * positive_share), regions)
    positive = _largest(keys, match.fg, most, torch.full_like(keys[:, :1], most))
    room = count - positive.sum(1, keepdim=True)
    negative = _largest(keys, background, min(count, regions), room)
    gt = torch.where(positive, match.gt, -1)
    return Match(positive, gt, ~(positive | negative), match.score)


def _largest(keys: Tensor, among: Tensor, slots: int, room: Tensor) -> Tensor:
    """The `room` (B, 1) regions with the largest keys `among` some, at most `slots`: (B, R) bool."""
    top = keys.masked_fill(~among, -1).topk(slots, dim=1)
    taken = (top.values >= 0) & (torch.arange(slots, device=keys.device) < room)
    return torch.zeros_like(among).scatter_(1, top.indices, taken)


def with_boxes(proposals: Tensor, match: Match, targets: Targets) -> tuple[Tensor, Match]:
    """The boxes to learn in front of an image's proposals, each assigned to itself: (B, G + P, 4) px and their match."""
    rows = torch.arange(targets.mask.shape[1], device=proposals.device).expand_as(targets.mask)
    boxes = torch.cat((targets.boxes.to(proposals.dtype), proposals), dim=1)
    gt = torch.where(targets.mask, rows, -1)
    return boxes, Match(
        torch.cat((targets.mask, match.fg), 1),
        torch.cat((gt, match.gt), 1),
        torch.cat((~targets.mask, match.ignored), 1),
    )


def gathered(match: Match, slots: int) -> tuple[Tensor, Match]:
    """What a sampled match holds, in `slots` slots: positives, then background, both in order of their index.

    Returns index (B, S) int64 of the regions, 0 in unused slots, and the match over the slots, in which unused ones are
    ignored.
    """
    regions = match.fg.shape[1]
    order = torch.arange(regions, 0, -1, device=match.fg.device)
    key = torch.where(match.fg, order + regions, order).masked_fill(match.ignored, 0)
    top = key.topk(min(slots, regions), dim=1)
    used = top.values > 0
    index = torch.where(used, top.indices, 0)
    fg = match.fg.gather(1, index) & used
    return index, Match(fg, torch.where(fg, match.gt.gather(1, index), -1), ~used)
