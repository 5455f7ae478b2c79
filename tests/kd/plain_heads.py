"""Head terms of detectors in two stages as their papers read: one image and one region at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from tests.kd.plain_baselines import Terms
from yoloxkd.kd.base import Step


class Region(NamedTuple):
    """What both heads say of a region: logits (K + 1,) and boxes (4,) px of one class; truth is None for background."""

    box: Tensor
    student: Tensor
    teacher: Tensor
    student_box: Tensor
    teacher_box: Tensor
    truth: Tensor | None


def decoded(region: Tensor, raw: Tensor, label: int, stds: tuple[float, ...]) -> Tensor:
    own = raw if len(raw) == 4 else raw[4 * label : 4 * label + 4]
    dx, dy, dw, dh = own * torch.tensor(stds)
    x, y, w, h = (region[0] + region[2]) / 2, (region[1] + region[3]) / 2, region[2] - region[0], region[3] - region[1]
    x, y, w, h = x + dx * w, y + dy * h, w * dw.exp(), h * dh.exp()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def code(boxes: Tensor, regions: Tensor) -> Tensor:
    """Shift of the center in region sides and logarithm of the sides; every side counts as at least a pixel."""
    size, side = ((x[:, 2:] - x[:, :2]).clamp_min(1) for x in (boxes, regions))
    return torch.cat(
        [((boxes[:, :2] + boxes[:, 2:]) - (regions[:, :2] + regions[:, 2:])) / 2 / side, (size / side).log()], 1
    )


def asked(step: Step[Any], b: int, boxes: Tensor, stage: int, rows: list[int | None]) -> list[Region]:
    """Both heads on boxes (S, 4) of an image; a row of -1 is background, None the teacher's most probable class."""
    models, sides = step.models, (step.student, step.teacher)
    said = [
        m.roi(tuple(x[b : b + 1] for x in out.features), boxes[None], stage)
        for m, out in zip(models, sides, strict=True)
    ]
    stds = [m.roi_head.rules[stage].stds for m in models]
    targets, out = step.batch.targets, []
    for i, row in enumerate(rows):
        logits = [s.cls_logits[0, i] for s in said]
        label = int(logits[1][:-1].argmax()) if row is None else int(targets.labels[b, row]) if row >= 0 else 0
        own = [decoded(boxes[i], s.box_raw[0, i], label, std) for s, std in zip(said, stds, strict=True)]
        truth = targets.boxes[b, row] if row is not None and row >= 0 else None
        out.append(Region(boxes[i], logits[0], logits[1].detach(), own[0], own[1].detach(), truth))
    return out


def trained(step: Step[Any]) -> Iterator[list[list[Region]]]:
    """Stage by stage, image by image, the regions that the student trains on."""
    for stage in range(min(len(step.match.stages), len(step.teacher.stages))):
        boxes, match = step.match.boxes[stage], step.match.stages[stage]
        images = []
        for b in range(len(boxes)):
            used = (~match.ignored[b]).nonzero().flatten()
            images.append(asked(step, b, boxes[b, used], stage, match.gt[b, used].tolist()))
        yield images


def mean_of(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean() if values else torch.zeros(())


def over(step: Step[Any], value: Callable[[Region], Tensor], counts: Callable[[Region], bool]) -> Tensor:
    """Mean over an image's regions that count, over images, and over stages."""
    return mean_of([mean_of([mean_of([value(r) for r in i if counts(r)]) for i in images]) for images in trained(step)])


def positive(r: Region) -> bool:
    return r.truth is not None


def divergence(r: Region) -> Tensor:
    p, q = r.teacher.softmax(0), r.student.softmax(0)
    return (p * (p.log() - q.log())).sum()


def defeat(method: Any, step: Step[Any]) -> Terms:
    cfg = method.cfg
    return {
        "head_fg": over(step, divergence, positive) * cfg.head_alpha,
        "head_bg": over(step, divergence, lambda r: not positive(r)) * cfg.head_beta,
    }


def tadf(method: Any, step: Step[Any]) -> Terms:
    def classes(r: Region) -> Tensor:
        p, q = r.teacher.softmax(0), r.student.softmax(0)
        return (F.binary_cross_entropy(q, p, reduction="none") - F.binary_cross_entropy(p, p, reduction="none")).mean()

    def boxes(r: Region) -> Tensor:
        assert r.truth is not None
        better = box_iou(r.teacher_box[None], r.truth[None]) > box_iou(r.box[None], r.truth[None])
        ours, theirs = (code(x[None], r.box[None])[0] for x in (r.student_box, r.teacher_box))
        return (ours - theirs).abs().mean() * better.float().squeeze()

    cfg = method.cfg
    return {
        "head_cls": over(step, classes, positive) * cfg.head_alpha,
        "head_box": over(step, boxes, positive) * cfg.head_beta,
    }


def chen(method: Any, step: Step[Any]) -> Terms:
    cfg = method.cfg

    def classes(r: Region) -> Tensor:
        weight = torch.ones_like(r.teacher)
        weight[-1] = cfg.background
        return -(weight * r.teacher.softmax(0) * r.student.log_softmax(0)).sum()

    def boxes(r: Region) -> Tensor:
        assert r.truth is not None
        ours, theirs = (code(x[None], r.truth[None]).square().sum() for x in (r.student_box, r.teacher_box))
        return ours if ours + cfg.margin > theirs else ours * 0

    return {"cls": over(step, classes, lambda r: True) * cfg.alpha, "box": over(step, boxes, positive) * cfg.beta}


def mimic(method: Any, step: Step[Any]) -> Terms:
    boxes, used = method.proposals(step)
    cls, box = [], []
    for b in range(len(boxes)):
        regions = asked(step, b, boxes[b, used[b]], 0, [None] * int(used[b].sum()))
        cls.append(mean_of([((r.student - r.teacher) ** 2).mean() / 2 for r in regions]))
        codes = [[code(x[None], r.box[None]) for x in (r.student_box, r.teacher_box)] for r in regions]
        box.append(mean_of([((ours - theirs) ** 2).mean() / 2 for ours, theirs in codes]))
    return {"head_cls": mean_of(cls) * method.cfg.beta, "head_box": mean_of(box) * method.cfg.beta}


def gid(method: Any, step: Step[Any]) -> Terms:
    places = method.places(step)
    boxes, used = method.instances(step, places, places.counted(step.batch))
    assert used.any()
    cls, box = [], []
    for b in range(len(boxes)):
        regions = asked(step, b, boxes[b, used[b]], 0, [None] * int(used[b].sum()))
        cls.append(mean_of([divergence(r) for r in regions]))
        codes = [[code(x[None], r.box[None]) for x in (r.student_box, r.teacher_box)] for r in regions]
        box.append(mean_of([F.smooth_l1_loss(*pair, reduction="sum", beta=method.cfg.beta) for pair in codes]))
    return {"head_cls": mean_of(cls) * method.cfg.cls, "head_box": mean_of(box) * method.cfg.box}


PLAIN_HEADS: dict[str, Callable[[Any, Step[Any]], Terms]] = {
    "defeat": defeat,
    "tadf": tadf,
    "chen": chen,
    "mimic": mimic,
    "gid": gid,
}
