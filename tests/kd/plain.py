"""FGD and PGD as their equations read: one image and one object at a time, everything by autograd.

The batched versions of the package are held equal to these, and timed against them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from yoloxkd.kd.functional.importance import COVARIANCE_EPS, Predictions
from yoloxkd.kd.methods.fgd import FGD, GlobalContext
from yoloxkd.kd.methods.pgd import PGD
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.types import Batch, DenseOutput


def overlaps(predicted: Tensor, box: Tensor) -> Tensor:
    """(A, 4), (4,) -> IoU (A,)."""
    size = (torch.minimum(predicted[:, 2:], box[2:]) - torch.maximum(predicted[:, :2], box[:2])).clamp_min(0)
    common = size[:, 0] * size[:, 1]
    areas = (predicted[:, 2:] - predicted[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return common / (areas - common).clamp_min(1e-6)


def pgd_weights_by_object(
    seen: Predictions, boxes: Tensor, labels: Tensor, rows: Tensor, xi: float, k: int = 30, k_share: float = 1.0
) -> Tensor:
    """Importance of each location, (B, A): quality, the k best inside, their Gaussian, object by object.

    k_share  the largest part of the locations inside that are taken
    """
    assert seen.probability is not None
    assert seen.boxes is not None
    points = seen.points
    out = points.new_zeros(len(boxes), len(points))
    for b in range(len(boxes)):
        for g in range(boxes.shape[1]):
            if not rows[b, g]:
                continue
            box, label = boxes[b, g], int(labels[b, g])
            inside = ((points > box[:2]) & (points < box[2:])).all(1)
            p = seen.probability[b, :, label] if label >= 0 else torch.ones_like(seen.boxes[b, :, 0])
            q = (p ** (1 - xi) * overlaps(seen.boxes[b], box) ** xi).view(len(points), -1).amax(1) * inside
            best = q.topk(min(k, len(q), math.ceil(k_share * int(inside.sum()) - 1e-6)))
            chosen = best.indices[best.values > 0]
            if len(chosen) == 0:
                continue
            at = points[chosen].double()
            d = at - at.mean(0)
            inverse = torch.linalg.inv(d.T @ d / len(at) + COVARIANCE_EPS * torch.eye(2, dtype=torch.float64))
            weight = torch.exp(-0.5 * ((d @ inverse) * d).sum(1)).to(points.dtype)
            out[b, chosen] = torch.maximum(out[b, chosen], weight)
    return out


def inside_by_object(points: Tensor, boxes: Tensor, rows: Tensor) -> Tensor:
    """(A, 2), (B, G, 4), (B, G) -> (B, A) bool."""
    out = torch.zeros(len(boxes), len(points), dtype=torch.bool)
    for b in range(len(boxes)):
        for box in boxes[b][rows[b]]:
            out[b] |= ((points > box[:2]) & (points < box[2:])).all(1)
    return out


def pgd_cls_by_image(s: Tensor, t: Tensor, weight: Tensor, background: Tensor, tau: float) -> dict[str, Tensor]:
    """Terms of a classification map (B, C, h, w) with weights (B, h, w)."""
    totals: dict[str, list[Tensor]] = {"fg": [], "bg": [], "attention": []}
    for b in range(len(s)):
        cells = s.shape[2] * s.shape[3]
        p = [cells * torch.softmax((f[b].abs().mean(0) / tau).flatten(), 0).view(s.shape[2:]) for f in (s, t)]
        a = [s.shape[1] * torch.softmax(f[b].abs() / tau, 0) for f in (s, t)]
        error = p[1] * (a[1] * (t[b] - s[b]) ** 2).sum(0)
        totals["fg"].append((weight[b] / max(int((weight[b] != 0).sum()), 1) * error).sum())
        totals["bg"].append((background[b] / max(int((background[b] != 0).sum()), 1) * error).sum())
        totals["attention"].append((p[1] - p[0]).abs().sum() + (a[1] - a[0]).abs().sum(0).mean())
    return {k: torch.stack(v).mean() for k, v in totals.items()}


def pgd_reg_by_image(s: Tensor, t: Tensor, weight: Tensor, tau: float) -> dict[str, Tensor]:
    """Terms of a regression map."""
    totals: dict[str, list[Tensor]] = {"fea": [], "attention": []}
    for b in range(len(s)):
        count = max(int((weight[b] != 0).sum()), 1)
        a = [s.shape[1] * torch.softmax(f[b].abs() / tau, 0) for f in (s, t)]
        error = (a[1] * (t[b] - s[b]) ** 2).mean(0)
        totals["fea"].append((weight[b] / count * error).sum())
        totals["attention"].append(((weight[b] != 0) * (a[1] - a[0]).abs().sum(0)).sum() / count)
    return {k: torch.stack(v).mean() for k, v in totals.items()}


def fgd_masks_by_object(boxes: Tensor, rows: Tensor, h: int, w: int, image: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Foreground and background weights (B, h, w), a rectangle at a time."""
    fg = boxes.new_zeros(len(boxes), h, w)
    scale = boxes.new_tensor([w, h, w, h])
    extent = boxes.new_tensor([image[1], image[0], image[1], image[0]])
    for b in range(len(boxes)):
        for box in boxes[b][rows[b]]:
            at = box * scale / extent
            x1, y1, x2, y2 = (int(v) for v in (*at[:2].floor(), *at[2:].ceil()))
            part = fg[b, max(y1, 0) : max(y2 + 1, 0), max(x1, 0) : max(x2 + 1, 0)]
            part.copy_(part.clamp_min(1.0 / ((x2 + 1 - x1) * (y2 + 1 - y1))))
    bg = (fg == 0).to(fg.dtype)
    return fg, bg / bg.sum((1, 2), keepdim=True).clamp_min(1)


def fgd_terms_by_image(s: Tensor, t: Tensor, fg: Tensor, bg: Tensor, tau: float) -> dict[str, Tensor]:
    """Terms of a map (B, C, h, w) with weights (B, h, w)."""
    totals: dict[str, list[Tensor]] = {"fg": [], "bg": [], "attention": []}
    for b in range(len(s)):
        c, h, w = s[b].shape
        p = [h * w * torch.softmax((f[b].abs().mean(0) / tau).flatten(), 0).view(h, w) for f in (s, t)]
        a = [c * torch.softmax(f[b].abs().mean((1, 2)) / tau, 0) for f in (s, t)]
        error = p[1] * a[1][:, None, None] * (s[b] - t[b]) ** 2
        totals["fg"].append((fg[b] * error).sum())
        totals["bg"].append((bg[b] * error).sum())
        totals["attention"].append((p[0] - p[1]).abs().sum() + (a[0] - a[1]).abs().sum())
    return {k: torch.stack(v).mean() for k, v in totals.items()}


def fgd_relation_by_image(s: Tensor, t: Tensor, of_student: GlobalContext, of_teacher: GlobalContext) -> Tensor:
    """The global term of a map (B, C, h, w)."""
    totals = []
    for b in range(len(s)):
        related = []
        for f, block in ((s[b], of_student), (t[b], of_teacher)):
            share = torch.softmax(block.logit(f[None]).flatten(), 0)
            context = (f.flatten(1) * share).sum(1)
            related.append(f + block.expand(torch.relu(block.norm(block.squeeze(context))))[:, None, None])
        totals.append(((related[1] - related[0]) ** 2).sum())
    return torch.stack(totals).mean()


def fgd_by_object(
    method: FGD, student: DenseOutput, teacher: DenseOutput, batch: Batch, model: DenseDetector
) -> dict[str, Tensor]:
    """`FGD.compare` of maps with equal channels, on images that fill the input."""
    out = {}
    for i, level in enumerate(method.pairing.levels):
        s, t = student.features[i], teacher.features[i]
        h, w = s.shape[2:]
        masks = fgd_masks_by_object(batch.targets.boxes, batch.targets.mask, h, w, teacher.image_size)
        terms = fgd_terms_by_image(s, t, *masks, method.cfg.tau)
        key = f"s{level.stride}"
        terms["global"] = fgd_relation_by_image(s, t, method.student_blocks[key], method.teacher_blocks[key])
        out |= {f"{term}/{key}": value * method.weights[term] for term, value in terms.items()}
    return out


def pgd_by_object(
    method: PGD, student: DenseOutput, teacher: DenseOutput, batch: Batch, model: DenseDetector
) -> dict[str, Tensor]:
    """`PGD.compare` of classification and regression maps, likewise."""
    cfg, targets = method.cfg, batch.targets
    seen = Predictions(teacher.grid.points, model.class_probability(teacher), teacher.boxes)
    args = (seen, targets.boxes, targets.labels, targets.mask)
    weights = [pgd_weights_by_object(*args, xi, cfg.k) for xi in (cfg.xi_cls, cfg.xi_reg)]
    background = (~inside_by_object(teacher.grid.points, targets.boxes, targets.mask)).to(weights[0].dtype)
    out, start = {}, 0
    for i, level in enumerate(method.pairing.levels):
        h, w = teacher.grid.sizes[i]
        here = slice(start, start + h * w)
        start += h * w
        of_cls, of_reg, plain = (x[:, here].view(-1, h, w) for x in (*weights, background))
        maps = (x[i] for x in (student.cls_features, teacher.cls_features, student.reg_features, teacher.reg_features))
        s_cls, t_cls, s_reg, t_reg = maps
        cls = pgd_cls_by_image(s_cls, t_cls, of_cls, plain, cfg.tau)
        reg = pgd_reg_by_image(s_reg, t_reg, of_reg, cfg.tau)
        for branch, terms in (("cls", cls), ("reg", reg)):
            for term, value in terms.items():
                level_weight = cfg.level_weights[i] if branch == "cls" and term != "attention" else 1.0
                out[f"{branch}_{term}/s{level.stride}"] = value * method.weights[branch][term] * level_weight
    return out
