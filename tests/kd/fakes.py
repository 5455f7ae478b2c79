"""A detector of a few thousand weights, and batches to feed it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.config.strict import Strict
from yoloxkd.engine.events import State
from yoloxkd.nn.detector import DenseDetector, InputConvention, Taps
from yoloxkd.types import Batch, DenseOutput, Loss, Losses, Targets, task_losses

SIZE = 64


class TinyDetector(DenseDetector):
    """One convolution a level and one a tower, all with batch norm; FCOS-like points and boxes."""

    class Config(Strict):
        channels: int = 6

    family = "tiny"

    def __init__(
        self,
        channels: int = 6,
        levels: Sequence[int] = (8, 16),
        names: Sequence[str] = ("cat", "dog", "bird"),
        convention: InputConvention | None = None,
    ) -> None:
        super().__init__()
        self.levels, self.names = tuple(levels), list(names)
        self.input = convention or InputConvention(std=(255.0, 255.0, 255.0))
        n = len(levels)
        self.taps = Taps((channels,) * n, (channels,) * n, (channels,) * n)

        def block(inputs: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.SiLU()
            )

        self.backbone = block(3)
        self.neck = nn.ModuleList(block(channels) for _ in levels)
        self.cls_tower = nn.ModuleList(block(channels) for _ in levels)
        self.reg_tower = nn.ModuleList(block(channels) for _ in levels)
        self.cls_pred = nn.Conv2d(channels, len(self.names), 1)
        self.reg_pred = nn.Conv2d(channels, 4, 1)

    def dense(self, x: Tensor) -> DenseOutput:
        height, width = x.shape[2:]
        base = self.backbone(x)
        features = tuple(b(F.avg_pool2d(base, s)) for b, s in zip(self.neck, self.levels, strict=True))
        cls = tuple(b(f) for b, f in zip(self.cls_tower, features, strict=True))
        reg = tuple(b(f) for b, f in zip(self.reg_tower, features, strict=True))
        logits = torch.cat([self.cls_pred(f).flatten(2) for f in cls], 2).transpose(1, 2)
        raw = torch.cat([self.reg_pred(f).flatten(2) for f in reg], 2).transpose(1, 2)
        sizes = tuple((f.shape[2], f.shape[3]) for f in features)
        points, strides = [], []
        for (h, w), s in zip(sizes, self.levels, strict=True):
            y, x_ = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            points.append((torch.stack([x_, y], -1).reshape(-1, 2) + 0.5) * s)
            strides.append(torch.full((h * w,), float(s)))
        where, stride = torch.cat(points).to(raw.device), torch.cat(strides).to(raw.device)
        far = raw.float().sigmoid() * 4 * stride[:, None]
        boxes = torch.cat([where - far[..., :2], where + far[..., 2:]], -1)
        return DenseOutput(
            features=features,
            cls_features=cls,
            reg_features=reg,
            cls_logits=logits,
            box_raw=raw,
            boxes=boxes,
            quality=None,
            points=where,
            strides=stride,
            sizes=sizes,
            levels=self.levels,
            image_size=(height, width),
        )

    def losses(self, out: DenseOutput, targets: Targets) -> Losses:
        means = {"cls": out.cls_logits, "box": out.box_raw}
        return task_losses(**{name: Loss(x.float().square().mean()) for name, x in means.items()})

    def scores(self, out: DenseOutput) -> Tensor:
        return self.class_probability(out)


def make_batch(images: int = 2, size: int = SIZE, seed: int = 0, classes: int = 3, boxes: int = 4) -> Batch:
    """Random pictures with `boxes` boxes each, one of them an ignore region in the last image."""
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(images, boxes, 2, generator=g) * size * 0.6
    high = low + size * (0.1 + 0.3 * torch.rand(images, boxes, 2, generator=g))
    mask = torch.ones(images, boxes, dtype=torch.bool)
    ignore = torch.zeros_like(mask)
    mask[-1, -1], ignore[-1, -1] = False, True
    targets = Targets(torch.cat([low, high], -1), torch.randint(0, classes, mask.shape, generator=g), mask, ignore)
    pictures = torch.randint(0, 256, (images, 3, size, size), generator=g, dtype=torch.uint8)
    content = torch.tensor([[0.0, 0.0, size, size]]).repeat(images, 1)
    return Batch(pictures, targets, content)


def metrics(ap: float, names: Sequence[str]) -> dict[str, Any]:
    """What an evaluation gives when every class has the same AP."""
    return {"AP": ap, "per_class": {name: {"AP": ap, "AP50": ap} for name in names}}


def make_state(student: DenseDetector, **changes: Any) -> tuple[State, list[str]]:
    """A run's state as callbacks see it, and the lines it was told."""
    said: list[str] = []
    values: dict[str, Any] = {
        "recipe": SimpleNamespace(engine=SimpleNamespace(compile=False)),
        "detector": student,
        "device": torch.device("cpu"),
        "out": Path("unused"),
        "epochs": 10,
        "iters_per_epoch": 4,
        "say": said.append,
        "evaluate": lambda model, limit: metrics(0.5, student.names),
        "val": None,
    }
    return State(**(values | changes)), said
