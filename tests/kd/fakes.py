"""A detector of a few thousand weights, and batches to feed it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.config.schedule import ScheduleSection
from yoloxkd.config.strict import Strict
from yoloxkd.engine.events import State
from yoloxkd.nn.assigners.match import Match, no_match
from yoloxkd.nn.dense.dense_detector import DenseDetector, Maps, Predictions
from yoloxkd.nn.dense.yolox import YOLOX
from yoloxkd.nn.detector import BoxCode, DetectorSpec, InputConvention
from yoloxkd.ops.boxes import from_distances
from yoloxkd.types import Batch, DenseOutput, Draw, Grid, Loss, Losses, Tap, Targets, task_losses

SIZE = 64


class TinyDetector(DenseDetector):
    """One convolution a level and one a tower, all with batch norm; FCOS-like points and boxes, no background."""

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
        super().__init__(self.Config(channels=channels), names)
        maps = dict.fromkeys(levels, channels)
        self.spec = DetectorSpec(
            names=tuple(names),
            strides=tuple(levels),
            channels={Tap.BACKBONE: {1: channels}, Tap.NECK: maps, Tap.CLS: maps, Tap.REG: maps},
            box_code=BoxCode("distances"),
            input=convention or InputConvention(std=(255.0, 255.0, 255.0)),
        )

        def block(inputs: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.SiLU()
            )

        self.backbone = block(3)
        self.neck = nn.ModuleList(block(channels) for _ in levels)
        self.cls_tower = nn.ModuleList(block(channels) for _ in levels)
        self.reg_tower = nn.ModuleList(block(channels) for _ in levels)
        self.cls_pred = nn.Conv2d(channels, len(names), 1)
        self.reg_pred = nn.Conv2d(channels, 4, 1)

    def pyramid(self, x: Tensor) -> tuple[Maps, Maps]:
        base = self.backbone(x)
        return (base,), tuple(b(F.avg_pool2d(base, s)) for b, s in zip(self.neck, self.spec.strides, strict=True))

    def tower(self, branch: Tap, maps: Maps, start: int = 0, stop: int | None = None) -> Maps:
        blocks = self.cls_tower if branch == Tap.CLS else self.reg_tower
        return tuple(b(x) for b, x in zip(blocks, maps, strict=True)) if start == 0 else maps

    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        return Predictions([self.cls_pred(x) for x in cls], [self.reg_pred(x) for x in reg])

    def decode(self, raw: Tensor, grid: Grid) -> Tensor:
        return from_distances(grid.points, raw.float().sigmoid() * 4 * grid.point_strides[:, None])

    def assign(self, out: DenseOutput, targets: Targets, draw: Draw = Draw()) -> Match:
        return no_match(*out.cls_logits.shape[:2], out.cls_logits.device)

    def losses(self, out: DenseOutput, targets: Targets, match: Match) -> Losses:
        means = {"cls": out.cls_logits, "box": out.box_raw}
        return task_losses(**{name: Loss(x.float().square().mean()) for name, x in means.items()})


def tiny_yolox(seed: int = 0, names: Sequence[str] = ("cat", "dog", "bird"), width: float = 0.03125) -> YOLOX:
    """A narrow YOLOX whose maps and predictions differ from place to place, as a trained one's do."""
    torch.manual_seed(seed)
    model = YOLOX(YOLOX.Config(depth=0.33, width=width, depthwise=True), names)
    for predictor in [*model.head.cls_preds, *model.head.obj_preds, *model.head.reg_preds]:
        nn.init.normal_(predictor.get_parameter("weight"), std=0.3)
        nn.init.normal_(predictor.get_parameter("bias"), std=0.5)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(make_batch(images=8, size=96, seed=seed).images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return model


def make_batch(images: int = 2, size: int = SIZE, seed: int = 0, classes: int = 3, boxes: int = 4) -> Batch:
    """Random images with `boxes` boxes each, one of them an ignore region in the last image."""
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
        "recipe": SimpleNamespace(
            engine=SimpleNamespace(compile=False),
            train=SimpleNamespace(epochs=10),
            schedule=ScheduleSection(warmup_epochs=1),
        ),
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
