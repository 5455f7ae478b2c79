"""Foreground weights by the teacher's predictions (PGD section 3.2, Table 5).

Legend: B images, G padded boxes, A locations over all levels, X values of xi, K best locations of a box.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from yoloxkd.kd.functional.masks import box_parts
from yoloxkd.kd.functional.precision import full_precision, without_autocast
from yoloxkd.ops import devices
from yoloxkd.ops.boxes import paired_iou

Strategy = Literal["box", "box-gauss", "centre", "quality", "topk-eq", "kde", "gauss"]
Order = Literal["paper", "release"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
BY_BEST: tuple[Strategy, ...] = ("topk-eq", "kde", "gauss")
"""Those that take an object's k best locations."""

COVARIANCE_EPS = 0.1**2 / 12
"""px²: the variance of the uniform noise of ±0.05 px that the published code adds to the locations it fits."""
CENTER_SHARE = 0.2
"""Sides of the `centre` region over the sides of its box."""
MIN_UNION = 1e-6
ROUNDING = 1e-6
"""Locations: a share that is a whole number of them but for rounding is that number."""
BORDER = 1e-2
"""px: a location this near to a border lies on it."""
PAIR_BUDGET = {"cpu": 3_000_000, "other": 2**26}
"""Elements of a (B, boxes, A) intermediate by device; more boxes than fit are taken in several goes."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the teacher says at each location, n predictions of a location side by side.

    points       (A, 2) px
    probability  (B, n A, K) of each class; None for strategies that do not ask (`box`, `box-gauss`, `centre`)
    boxes        (B, n A, 4) px, likewise
    """

    points: Tensor
    probability: Tensor | None
    boxes: Tensor | None

    @property
    def per_location(self) -> int:
        """n"""
        return 1 if self.boxes is None else self.boxes.shape[1] // self.points.shape[0]


@without_autocast
def inside_any(points: Tensor, boxes: Tensor, rows: Tensor) -> Tensor:
    """(A, 2) points, (B, G, 4) boxes, (B, G) which of them count -> (B, A) bool: strictly inside at least one."""
    out = torch.zeros(boxes.shape[0], points.shape[0], dtype=torch.bool, device=boxes.device)
    for part in box_parts(boxes.shape[1], boxes.shape[0] * points.shape[0], boxes.device, PAIR_BUDGET):
        out |= (_inside(points, boxes[:, part]) & rows[:, part, None]).any(1)
    return out


def touched_by_any(points: Tensor, boxes: Tensor, rows: Tensor) -> Tensor:
    """As `inside_any`, borders included: a region to ignore that starts where the image starts has locations on them."""
    if rows.device.type in devices.READ_DEVICES and not rows.any():
        return torch.zeros(boxes.shape[0], points.shape[0], dtype=torch.bool, device=boxes.device)
    return inside_any(points, torch.cat((boxes[..., :2] - BORDER, boxes[..., 2:] + BORDER), -1), rows)


@torch.no_grad()
@without_autocast
def quality(predictions: Predictions, boxes: Tensor, labels: Tensor, xi: tuple[float, ...]) -> Tensor:
    """log of p^(1 - xi) IoU^xi for every box and location, wherever the location lies: (X, B, G, A). PGD eq. (1).

    boxes   (B, G, 4) px
    labels  (B, G) index into the teacher's classes; -1, a class it does not know, has p = 1: localization alone
    The union is at least 1e-6. A product of zero is -inf, and so is what is not a number. Of several predictions at a
    location the best one counts.
    """
    assert predictions.probability is not None
    assert predictions.boxes is not None
    by_class = full_precision(predictions.probability).transpose(1, 2)
    index = labels.clamp_min(0)[..., None].expand(-1, -1, by_class.shape[2])
    log_p = torch.where(labels[..., None] < 0, 1.0, by_class.gather(1, index)).log_()
    log_iou = _overlap(full_precision(boxes), full_precision(predictions.boxes)).log_()
    several: Tensor = _blend(log_p, log_iou, xi).unflatten(-1, (-1, predictions.per_location))
    return several.amax(-1)


def _blend(log_p: Tensor, log_iou: Tensor, xi: tuple[float, ...]) -> Tensor:
    """(...) each -> log of p^(1 - xi) IoU^xi (X, ...); -inf for what is not a number."""
    out = []
    for value in xi:
        if value in (0.0, 1.0):  # 0 * log 0 would be NaN where 0^0 is 1
            out.append(log_p if value == 0.0 else log_iou)
        else:
            out.append((1.0 - value) * log_p + value * log_iou)
    return torch.stack(out).nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


@torch.no_grad()
@without_autocast
def pgd_weights(
    predictions: Predictions,
    boxes: Tensor,
    labels: Tensor,
    rows: Tensor,
    *,
    xi: tuple[float, ...],
    k: int = 30,
    k_share: float | None = None,
    strategy: Strategy = "gauss",
    order: Order = "paper",
    eps: float = COVARIANCE_EPS,
    det_eps: float = 0.0,
) -> Tensor:
    """Importance of each location, the largest over the objects of its image, 0 where there is none: (X, B, A), 0 to 1.

    predictions  of the teacher
    boxes   (B, G, 4) px; labels (B, G) index into the teacher's classes or -1; rows (B, G) bool, boxes that count
    xi      balance of classification and localization, one result for each
    k       locations of an object, at most; ties go to the lower index, a quality of zero is never chosen
    k_share  and at most this share, rounded up, of the locations inside its box
    order   "paper": the k best inside the box (PGD eq. 1 to 3); "release": the k best anywhere are fitted, then those
            outside the box are dropped
    eps     px², added to the diagonal of the fitted covariance; det_eps px⁴, added to its determinant
    The strategies are those of PGD Table 5. Where it leaves a measure open: `box-gauss` has half a side of the box as
    standard deviation; `kde` is a Gaussian kernel of Scott's bandwidth scaled to 1 at its densest location.
    """
    points = full_precision(predictions.points)
    boxes = boxes.to(torch.promote_types(points.dtype, torch.float32))
    out = boxes.new_zeros(len(xi), boxes.shape[0], points.shape[0])
    pairs = boxes.shape[0] * len(xi) * points.shape[0] * predictions.per_location
    goes = box_parts(boxes.shape[1], pairs, boxes.device, PAIR_BUDGET)
    for part in goes:
        some = boxes[:, part], labels[:, part], rows[:, part]
        if strategy in ("box", "box-gauss", "centre"):
            importance = _by_geometry(points, some[0], some[2], strategy)[None]
        else:
            importance = _by_quality(predictions, points, *some, xi, k, k_share, strategy, order, eps, det_eps)
        out = torch.maximum(out, importance)
    return out


def _by_geometry(points: Tensor, boxes: Tensor, rows: Tensor, strategy: Strategy) -> Tensor:
    """(B, A) weights from the boxes alone."""
    if strategy == "centre":
        middle, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) * (CENTER_SHARE / 2)
        boxes = torch.cat([middle - half, middle + half], -1)
    inside = _inside(points, boxes) & rows[..., None]
    if strategy != "box-gauss":
        return inside.any(1).to(points.dtype)
    middle, half = (boxes[..., :2] + boxes[..., 2:]) / 2, ((boxes[..., 2:] - boxes[..., :2]) / 2).clamp_min(MIN_UNION)
    dx = (points[:, 0] - middle[..., 0:1]) / half[..., 0:1]
    dy = (points[:, 1] - middle[..., 1:2]) / half[..., 1:2]
    return ((dx * dx + dy * dy).mul_(-0.5).exp_() * inside).amax(1)


def _by_quality(
    predictions: Predictions,
    points: Tensor,
    boxes: Tensor,
    labels: Tensor,
    rows: Tensor,
    xi: tuple[float, ...],
    k: int,
    k_share: float | None,
    strategy: Strategy,
    order: Order,
    eps: float,
    det_eps: float,
) -> Tensor:
    """(X, B, A) weights from the teacher's quality."""
    inside = _inside(points, boxes)
    candidates = inside & rows[..., None] if order == "paper" or strategy == "quality" else rows[..., None]
    if strategy == "quality":
        return quality(predictions, boxes, labels, xi).masked_fill_(~candidates, -torch.inf).exp_().amax(2)
    best_of = best_of_pairs if order == "paper" and points.device.type in devices.READ_DEVICES else best_of_table
    best, index = best_of(predictions, boxes, labels, candidates, xi, k)
    if k_share is not None:
        best, index = _first(best, index, _limits(inside, k_share))
    at = points[index]  # (X, B, G, K, 2)
    there = best > -torch.inf
    if strategy == "topk-eq":
        weight = there.to(points.dtype)
    elif strategy == "kde":
        weight = kernel_density(at, there, eps)
    else:
        weight = gaussian_importance(at, there, eps, det_eps)[0]
    if order == "release":
        weight = weight * inside.expand(len(xi), -1, -1, -1).gather(-1, index)
    out = weight.new_zeros(len(xi), len(boxes), len(points))
    return out.scatter_reduce(2, index.flatten(2), weight.flatten(2), "amax")


def _limits(inside: Tensor, share: float) -> Tensor:
    """The share of each object's locations (B, G, A), rounded up, and at least 1: (B, G)."""
    return (inside.sum(-1).double() * share - ROUNDING).ceil().clamp_min(1)


def _first(best: Tensor, index: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The best locations (X, B, G, K) in order, ties by index; from place `limit` (B, G) of an object on they are -inf."""
    order = index.argsort(dim=-1)
    best, index = best.gather(-1, order), index.gather(-1, order)
    order = best.argsort(dim=-1, descending=True, stable=True)
    best, index = best.gather(-1, order), index.gather(-1, order)
    place = torch.arange(best.shape[-1], device=best.device)
    return best.masked_fill(place >= limit[..., None], -torch.inf), index


def best_of_table(
    predictions: Predictions, boxes: Tensor, labels: Tensor, candidates: Tensor, xi: tuple[float, ...], k: int
) -> tuple[Tensor, Tensor]:
    """The k candidates (B, G, A) of each object with the highest quality: its logarithm and index into A (X, B, G, K).

    Fewer candidates, and those of quality zero, are -inf. Ties go to the lower index.
    """
    return topk_low(quality(predictions, boxes, labels, xi).masked_fill_(~candidates, -torch.inf), k)


def best_of_pairs(
    predictions: Predictions, boxes: Tensor, labels: Tensor, candidates: Tensor, xi: tuple[float, ...], k: int
) -> tuple[Tensor, Tensor]:
    """The same as `best_of_table` from a list of the candidates alone, which is short where boxes are small.

    Quality is computed for (object, location) pairs that are candidates. A stable sort by object and then by quality leaves
    each object's pairs side by side, best first.
    """
    images, rows, cells = candidates.shape
    image, row, cell = candidates.nonzero(as_tuple=True)
    q = _pair_quality(predictions, boxes, labels, image, row, cell, xi)
    owner = image * rows + row  # ascending, so that it is its own sorted version
    order = _sorted_pairs(owner, q)
    count = candidates.sum(-1).flatten()
    rank = torch.arange(len(owner), device=owner.device) - (count.cumsum(0) - count)[owner]
    top_pairs = (rank < k).nonzero().flatten()
    slot, pair, k = owner[top_pairs] * min(k, cells) + rank[top_pairs], order[:, top_pairs], min(k, cells)
    best = q.new_full((len(xi), images * rows * k), -torch.inf)
    index = torch.zeros(best.shape, dtype=torch.int64, device=q.device)
    best[:, slot], index[:, slot] = q.gather(1, pair), cell[pair]
    return best.view(len(xi), images, rows, k), index.view(len(xi), images, rows, k)


def _sorted_pairs(owner: Tensor, q: Tensor) -> Tensor:
    """Indices (X, P) that sort pairs by owner (P,) int64, then by falling q (X, P), then as they were."""
    if q.dtype is torch.float32:
        bits = (q + 0.0).view(torch.int32)  # + 0.0: a zero has no sign
        rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # integers in the order of the floats
        return ((owner << 32) - rising).argsort(dim=1, stable=True)
    order = q.argsort(dim=1, descending=True, stable=True)
    return order.gather(1, owner[order].argsort(dim=1, stable=True))


def _pair_quality(
    predictions: Predictions,
    boxes: Tensor,
    labels: Tensor,
    image: Tensor,
    row: Tensor,
    cell: Tensor,
    xi: tuple[float, ...],
) -> Tensor:
    """`quality` of P pairs of box and location given by index: (X, P)."""
    assert predictions.probability is not None
    assert predictions.boxes is not None
    which = cell[:, None] * predictions.per_location + torch.arange(predictions.per_location, device=cell.device)
    image, row = image[:, None], row[:, None]
    label = labels[image, row]
    p = full_precision(predictions.probability[image, which, label.clamp_min(0)])
    log_p = torch.where(label < 0, 1.0, p).log_()
    log_iou = paired_iou(
        full_precision(boxes)[image, row], full_precision(predictions.boxes[image, which]), MIN_UNION
    ).log_()
    return _blend(log_p, log_iou, xi).amax(-1)


def topk_low(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest along the last axis, ties to the lower index: values and indices (..., k), k at most the axis.

    Two passes of `topk`, which leaves the order of ties open: the first finds the k-th value, the second picks all
    above it and, among its equals, the lowest indices.
    """
    size = values.shape[-1]
    k = min(k, size)
    least = values.topk(k, -1, sorted=False).values.amin(-1, keepdim=True)
    position = torch.arange(size, device=values.device, dtype=torch.int32)
    key = (values >= least).int() + (values > least).int()
    index = key.mul_(size).sub_(position).topk(k, -1, sorted=False).indices
    return values.gather(-1, index), index


def gaussian_importance(at: Tensor, there: Tensor, eps: float, det_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum-likelihood Gaussian over selected locations and its value there, 1 at the mean. PGD eq. (2) and (3).

    at     (..., K, 2) px; there (..., K) bool, which of them exist
    -> importance (..., K), mean (..., 2) px, covariance (..., 2, 2) px² without eps
    In float64: the determinant of nearly collinear locations cancels in float32.
    """
    exact, real = at.double(), there.double()
    count = real.sum(-1).clamp_min(1.0)
    mean = (exact * real[..., None]).sum(-2) / count[..., None]
    d = (exact - mean[..., None, :]) * real[..., None]
    covariance = d.transpose(-1, -2) @ d / count[..., None, None]
    xx, yy, xy = covariance[..., 0, 0] + eps, covariance[..., 1, 1] + eps, covariance[..., 0, 1]
    determinant = (xx * yy - xy * xy + det_eps)[..., None]
    dx, dy = d[..., 0], d[..., 1]
    distance = yy[..., None] * dx * dx - 2 * xy[..., None] * dx * dy + xx[..., None] * dy * dy
    # without eps a single location has determinant 0 and distance 0: it is its own mean
    scaled = torch.where(distance > 0, distance / determinant, 0.0)
    return (torch.exp(-0.5 * scaled) * real).to(at.dtype), mean.to(at.dtype), covariance.to(at.dtype)


def kernel_density(at: Tensor, there: Tensor, eps: float) -> Tensor:
    """Gaussian kernel density of selected locations at themselves, 1 at the densest: (..., K, 2), (..., K) -> (..., K).

    Bandwidth by Scott's rule in two dimensions: covariance n^(-1/3), plus eps so that one location stays finite.
    """
    real = there.double()
    count = real.sum(-1).clamp_min(1.0)
    _, _, covariance = gaussian_importance(at.double(), there, eps, 0.0)
    bandwidth = covariance * count.pow(-1 / 3)[..., None, None]
    xx, yy, xy = bandwidth[..., 0, 0] + eps, bandwidth[..., 1, 1] + eps, bandwidth[..., 0, 1]
    determinant = (xx * yy - xy * xy)[..., None, None]
    d = at.double()[..., :, None, :] - at.double()[..., None, :, :]
    dx, dy = d[..., 0], d[..., 1]
    xx, yy, xy = xx[..., None, None], yy[..., None, None], xy[..., None, None]
    distance = (yy * dx * dx - 2 * xy * dx * dy + xx * dy * dy) / determinant
    density = (torch.exp(-0.5 * distance) * real[..., None, :]).sum(-1) * real
    return (density / density.amax(-1, keepdim=True).clamp_min(1e-300)).to(at.dtype)


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """(A, 2), (B, G, 4) -> (B, G, A) bool, strictly inside."""
    x, y = points[:, 0], points[:, 1]
    out = x > boxes[..., 0:1]
    return out.logical_and_(x < boxes[..., 2:3]).logical_and_(y > boxes[..., 1:2]).logical_and_(y < boxes[..., 3:4])


def _overlap(boxes: Tensor, predicted: Tensor) -> Tensor:
    """(B, G, 4), (B, A, 4) -> IoU (B, G, A)."""
    x1, y1, x2, y2 = (c[:, None, :] for c in predicted.transpose(1, 2).contiguous().unbind(1))
    g1, h1, g2, h2 = (c[:, :, None] for c in boxes.unbind(-1))
    common = torch.minimum(x2, g2).sub_(torch.maximum(x1, g1)).clamp_min_(0)
    common *= torch.minimum(y2, h2).sub_(torch.maximum(y1, h1)).clamp_min_(0)
    union = ((x2 - x1) * (y2 - y1) + (g2 - g1) * (h2 - h1)).sub_(common).clamp_min_(MIN_UNION)
    return common.div_(union)
