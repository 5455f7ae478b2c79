"""The papers' baselines as their equations read: one image and one object at a time, everything by autograd.

Beside `plain`, for the methods that FGD and PGD compare with; of maps with equal channels, on pictures that fill the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms, roi_align

from tests.kd.plain import overlaps
from yoloxkd.kd.base import Distiller, Step
from yoloxkd.kd.methods.chen import Chen
from yoloxkd.kd.methods.defeat import DeFeat
from yoloxkd.kd.methods.fgfi import FGFI
from yoloxkd.kd.methods.fkd import FKD
from yoloxkd.kd.methods.frs import FRS
from yoloxkd.kd.methods.gid import GID
from yoloxkd.kd.methods.mimic import Mimic
from yoloxkd.kd.methods.tadf import TADF
from yoloxkd.kd.pairing import LevelPair
from yoloxkd.types import DenseOutput

Terms = dict[str, Tensor]
DenseStep = Step[DenseOutput]


def strides_of(method: Distiller) -> list[int]:
    return [level.stride for level in method.pairing.levels]


def objects(step: DenseStep, b: int) -> Tensor:
    """(g, 4) px of an image."""
    return step.batch.targets.boxes[b][step.batch.targets.mask[b]]


def on_level(box: Tensor, levels: list[LevelPair]) -> int:
    """The level of a box by its size, 112 px at stride 8."""
    width, height = float(box[2] - box[0]), float(box[3] - box[1])
    octave = math.floor(math.log2(math.sqrt((width + 1) * (height + 1)) / (14 * levels[0].stride) + 1e-6))
    return min(max(octave, 0), len(levels) - 1)


def error_under(step: DenseStep, i: int, masks: list[Tensor]) -> Tensor:
    """Mean over images of the weighted mean over cells of the squared error's mean over channels."""
    s, t = step.student.features[i], step.teacher.features[i]
    values = [((s[b] - t[b]) ** 2).mean(0).mul(m).sum() / m.sum().clamp_min(1e-6) for b, m in enumerate(masks)]
    return torch.stack(values).mean()


def fgfi_by_object(method: FGFI, step: DenseStep) -> Terms:
    cfg, grid = method.cfg, step.teacher.grid
    half = grid.point_strides[:, None] * cfg.anchor_scale / 2
    anchors = torch.cat([grid.points - half, grid.points + half], 1) if grid.anchors is None else grid.anchors
    chosen = []
    for b in range(len(step.batch.images)):
        near = torch.zeros(len(anchors), dtype=torch.bool)
        for box in objects(step, b):
            overlap = overlaps(anchors, box)
            near |= overlap > cfg.threshold * overlap.max()
        chosen.append(near)
    out = {}
    for i, (part, size) in enumerate(zip(grid.slices(), grid.sizes, strict=True)):
        masks = [near[part].view(*size, -1).any(-1).float() for near in chosen]
        out[f"near/s{grid.strides[i]}"] = error_under(step, i, masks) * cfg.alpha
    return out


def rectangle(box: Tensor, stride: int, h: int, w: int) -> tuple[int, int, int, int, bool]:
    """Cells x1 .. x2 - 1 and y1 .. y2 - 1 of a box, and whether it is thin."""
    x1, y1, x2, y2 = (int(v / stride) for v in box.tolist())
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, w), min(y2, h)
    return (x1, y1, x1 + 1, y1 + 1, True) if x1 == x2 or y1 == y2 else (x1, y1, x2, y2, False)


def defeat_by_object(method: DeFeat, step: DenseStep) -> Terms:
    levels, out = method.pairing.levels, {}
    for i, level in enumerate(levels):
        h, w = step.teacher.features[i].shape[2:]
        masks = []
        for b in range(len(step.batch.images)):
            mask = torch.zeros(h, w)
            for box in objects(step, b):
                if method.cfg.assign == "all" or on_level(box, list(levels)) == i:
                    x1, y1, x2, y2, _ = rectangle(box, level.stride, h, w)
                    mask[y1:y2, x1:x2] = 1
            masks.append(mask)
        for term, weight, chosen in (("fg", method.cfg.alpha, masks), ("bg", method.cfg.beta, [1 - m for m in masks])):
            out[f"{term}/s{level.stride}"] = error_under(step, i, chosen) * weight / len(levels)
    return out


def tadf_by_object(method: TADF, step: DenseStep) -> Terms:
    levels, out = method.pairing.levels, {}
    for i, level in enumerate(levels):
        h, w = step.teacher.features[i].shape[2:]
        masks = []
        for b in range(len(step.batch.images)):
            mask = torch.zeros(h, w)
            for box in objects(step, b):
                if method.cfg.assign == "size" and on_level(box, list(levels)) != i:
                    continue
                x1, y1, x2, y2, thin = rectangle(box, level.stride, h, w)
                if thin:
                    mask[y1:y2, x1:x2] = 1
                    continue
                gy, gx = (torch.exp(-(((torch.arange(n) - n / 2) / (n / 2)) ** 2) / 2) for n in (y2 - y1, x2 - x1))
                mask[y1:y2, x1:x2] = torch.maximum(mask[y1:y2, x1:x2], gy[:, None] * gx)
            masks.append(mask)
        out[f"gauss/s{level.stride}"] = error_under(step, i, masks) * method.cfg.alpha / len(levels)
    return out


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """(N, K) logits -> (N,) sum over classes of the KL of Bernoulli variables."""
    p = teacher.sigmoid()
    cross = F.binary_cross_entropy_with_logits(student, p, reduction="none")
    return (cross - F.binary_cross_entropy_with_logits(teacher, p, reduction="none")).sum(-1)


def joint(step: DenseStep, who: str) -> Tensor:
    """Class logits (B, A, K); of a detector with objectness, of the product of both probabilities."""
    model, out = getattr(step.models, who), getattr(step, who)
    return out.cls_logits if model.family != "yolox" else torch.logit(model.scores(out).double()).float()


def frs_by_image(method: FRS, step: DenseStep) -> Terms:
    s_all, t_all, grid, out = joint(step, "student"), joint(step, "teacher"), step.teacher.grid, {}
    for i, (part, size) in enumerate(zip(grid.slices(), grid.sizes, strict=True)):
        feat, cls = [], []
        for b in range(len(s_all)):
            s, t = s_all[b, part], t_all[b, part]
            m = t.sigmoid().max(1).values
            error = ((step.student.features[i][b] - step.teacher.features[i][b]) ** 2).sum(0)
            feat.append((m.view(size) * error).sum() / m.sum())
            cls.append((m * divergence(s, t)).sum() / m.sum())
        out[f"feat/s{grid.strides[i]}"] = torch.stack(feat).mean() * method.cfg.alpha
        out[f"cls/s{grid.strides[i]}"] = torch.stack(cls).mean() * method.cfg.beta
    return out


def pool(maps: tuple[Tensor, ...], b: int, boxes: Tensor, strides: list[int], bins: int) -> Tensor:
    """(n, C, bins, bins), region by region from the level of its size."""
    rows = []
    for box in boxes:
        octave = math.floor(math.log2(math.sqrt(float((box[2:] - box[:2]).prod())) / 224 + 1e-8))
        index = max(sum(16 * 2.0**octave >= s for s in strides) - 1, 0)
        region = [torch.cat([box.new_zeros(1), box])[None].to(maps[0].dtype)]
        rows.append(roi_align(maps[index][b][None], region[0], bins, 1 / strides[index], 2, aligned=True)[0])
    return torch.stack(rows)


def gid_instances(method: GID, step: DenseStep, b: int) -> Tensor:
    p_s, p_t = (joint(step, who)[b].detach().sigmoid().max(1).values for who in ("student", "teacher"))
    boxes = torch.where((p_t > p_s)[:, None], step.teacher.boxes[b], step.student.boxes[b].detach())
    best = (p_t - p_s).abs().sort(descending=True, stable=True).indices[:3000]
    height, width = step.teacher.image_size
    chosen = boxes[best]
    chosen = torch.stack([chosen[:, 0::2].clamp(0, width), chosen[:, 1::2].clamp(0, height)], 2).flatten(1)
    large = ((chosen[:, 2:] - chosen[:, :2]) > 10).all(1)
    chosen, score = chosen[large], (p_t - p_s).abs()[best][large]
    return chosen[nms(chosen, score, 0.3)[: method.cfg.k]]


def relative(features: Tensor) -> Tensor:
    n = len(features)
    d = torch.stack([torch.stack([(a - b).square().sum().clamp_min(1e-12).sqrt() for b in features]) for a in features])
    d = d * (1 - torch.eye(n))
    return d / (d.sum() / (n * n - n))


def gid_by_image(method: GID, step: DenseStep) -> Terms:
    cfg, grid = method.cfg, step.student.grid
    half = grid.point_strides[:, None] * 4
    anchors = torch.cat([grid.points - half, grid.points + half], 1) if grid.anchors is None else grid.anchors
    found: dict[str, list[Tensor]] = {"feature": [], "relation": [], "cls": [], "box": []}
    for b in range(len(step.batch.images)):
        boxes = gid_instances(method, step, b)
        if len(boxes) == 0:
            for values in found.values():
                values.append(torch.zeros(()))
            continue
        s, t = (pool(x.features, b, boxes, strides_of(method), 10) for x in (step.student, step.teacher))
        found["feature"].append((s - t).square().sum() / (len(boxes) * 100))
        n = len(boxes)
        relation = torch.zeros(())
        if n >= 3:
            relation = F.smooth_l1_loss(relative(s.flatten(1)), relative(t.flatten(1)), reduction="sum") / (n * n - n)
        found["relation"].append(relation)
        answering = torch.zeros(len(anchors), dtype=torch.bool)
        for box in boxes:
            overlap = overlaps(anchors, box)
            answering |= (overlap >= 0.5) | ((overlap == overlap.max()) & (overlap > 0))
        s, t = (joint(step, who)[b][answering] for who in ("student", "teacher"))
        found["cls"].append(divergence(s, t).sum() / max(int(answering.sum()), 1))
        codes = [code(x.boxes[b][answering], anchors[answering]) for x in (step.student, step.teacher)]
        wrong = F.smooth_l1_loss(*codes, reduction="sum", beta=cfg.beta)
        found["box"].append(wrong / max(int(answering.sum()), 1))
    return {term: torch.stack(values).mean() * method.weights[term] for term, values in found.items()}


def code(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Shift of the center in sides and logarithm of the sides, which are at least a pixel."""
    size, side = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    shift = ((boxes[:, :2] + boxes[:, 2:]) - (anchors[:, :2] + anchors[:, 2:])) / 2 / side
    return torch.cat([shift, (size.clamp_min(1) / side).log()], 1)


def fkd_by_image(method: FKD, step: DenseStep) -> Terms:
    cfg, out = method.cfg, {}

    def root(x: Tensor) -> Tensor:
        return x.square().sum().clamp_min(1e-30).sqrt()

    for i, level in enumerate(method.pairing.levels):
        parts = method.blocks[f"s{level.stride}"].parts
        found: dict[str, list[Tensor]] = {"feat": [], "channel": [], "spatial": [], "nonlocal": []}
        for b in range(len(step.batch.images)):
            s, t = step.student.features[i][b], step.teacher.features[i][b]
            c, h, w = t.shape
            cells = [h * w * torch.softmax(f.abs().mean(0).flatten() / cfg.tau, 0).view(h, w) for f in (s, t)]
            channels = [c * torch.softmax(f.abs().mean((1, 2)) / cfg.tau, 0) for f in (s, t)]
            weight = (cells[0] + cells[1]) / 2 * ((channels[0] + channels[1]) / 2)[:, None, None]
            made, related = parts["map"], parts["relation"]
            found["feat"].append(root((t - cellwise(made, s)) * weight.detach().sqrt()))
            found["channel"].append(root(t.mean((1, 2)) - parts["channels"](s.mean((1, 2)))))
            found["spatial"].append(root(t.mean(0) - parts["cells"](s.mean(0)[None, None])[0, 0]))
            read = [nonlocal_of(block, f) for block, f in ((parts["student"], s), (parts["teacher"], t))]
            found["nonlocal"].append(root(read[1] - cellwise(related, read[0])))
        for term, values in found.items():
            out[f"{term}/s{level.stride}"] = torch.stack(values).mean() * method.weights[term]
    return out


def cellwise(linear: torch.nn.Module, x: Tensor) -> Tensor:
    """A linear layer as a 1x1 convolution of a map (C, h, w)."""
    return F.conv2d(x[None], linear.weight[:, :, None, None], linear.bias)[0]


def nonlocal_of(block: torch.nn.Module, x: Tensor) -> Tensor:
    """(C, h, w): theta, phi and g, the matrix of cells by pooled cells, the mean, the normalization."""
    theta = cellwise(block.theta, x).flatten(1)
    side = (min(block.pool, x.shape[1]), min(block.pool, x.shape[2]))
    phi, g = (F.max_pool2d(cellwise(layer, x)[None], side)[0].flatten(1) for layer in (block.phi, block.g))
    affinity = theta.T @ phi / phi.shape[1]
    read = cellwise(block.out, (affinity @ g.T).T.reshape(-1, *x.shape[1:])).flatten(1)
    normal = (read - read.mean(1, keepdim=True)) / (read.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return x + (normal * block.scale[:, None] + block.shift[:, None]).view_as(x)


def chen_by_image(method: Chen, step: DenseStep) -> Terms:
    cfg, match, out = method.cfg, step.match, {}
    for i, level in enumerate(method.pairing.levels):
        s, t = step.student.features[i], step.teacher.features[i]
        out[f"hint/s{level.stride}"] = (
            torch.stack([((a - b) ** 2).mean() for a, b in zip(s, t, strict=True)]).mean() * cfg.gamma
        )
    cls, box = [], []
    for b in range(len(step.batch.images)):
        positive = match.fg[b]
        rows = divergence(joint(step, "student")[b], joint(step, "teacher")[b])
        weight = torch.where(positive, 1.0, cfg.background)
        cls.append((rows * weight).sum() / max(int(positive.sum()), 1))
        total = torch.zeros(())
        for a in positive.nonzero().flatten().tolist():
            truth = step.batch.targets.boxes[b, match.gt[b, a]][None]
            ours, theirs = (code(x.boxes[b, a][None], truth).square().sum() for x in (step.student, step.teacher))
            if ours + cfg.margin > theirs:
                total = total + ours
        box.append(total / max(int(positive.sum()), 1))
    return out | {"cls": torch.stack(cls).mean() * cfg.alpha, "box": torch.stack(box).mean() * cfg.beta}


def mimic_by_image(method: Mimic, step: DenseStep) -> Terms:
    boxes, scores = step.models.student.candidates(step.student)
    values = []
    for b in range(len(boxes)):
        best = scores[b].detach().max(1).values
        order = best.topk(min(1000, len(best)))
        chosen = boxes[b].detach()[order.indices]
        kept = chosen[nms(chosen, order.values, 0.7)[: method.cfg.k]]
        s, t = (pool(x.features, b, kept, strides_of(method), 7) for x in (step.student, step.teacher))
        values.append(torch.stack([(u - v).square().mean() for u, v in zip(s, t, strict=True)]).mean() / 2)
    return {"regions": torch.stack(values).mean() * method.cfg.alpha}


PLAIN: dict[str, Callable[..., Terms]] = {
    "fgfi": fgfi_by_object,
    "defeat": defeat_by_object,
    "tadf": tadf_by_object,
    "frs": frs_by_image,
    "gid": gid_by_image,
    "fkd": fkd_by_image,
    "chen": chen_by_image,
    "mimic": mimic_by_image,
}
