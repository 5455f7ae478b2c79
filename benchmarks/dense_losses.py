"""The losses of dense detectors, assignment and backward pass included, against their plain reading."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import Row, run_script
from benchmarks.scenes import CLASSES, targets_of
from benchmarks.timing import alternate, ratio
from tests.losses import task
from tests.nn.fpn import narrow
from tests.nn.plain_losses import PLAIN
from tests.nn.plain_two_matches import PLAIN as TWO_MATCHES
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.dense.dense_detector import DenseDetector, Predictions
from yoloxkd.nn.dense.fpn_detector import LEVELS
from yoloxkd.types import DenseOutput, Targets

IMAGES, BOXES, SIZE = 8, 30, 800
GOAL = 10


def measure(quick: bool) -> Iterator[Row]:
    images, boxes, size, classes = (2, 3, 64, 3) if quick else (IMAGES, BOXES, SIZE, CLASSES)
    for family, plain in (PLAIN | TWO_MATCHES).items():
        model = narrow(DETECTORS[family], classes)  # type: ignore[arg-type]
        out, targets = output(model, images, size, classes), targets_of(images, boxes, size, classes=classes)
        turns = {
            "ours": partial(with_backward, task, model, out, targets),
            "plain": partial(with_backward, plain, model, out, targets),
        }
        for ours, theirs in zip(turns["ours"](), turns["plain"](), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        samples = alternate(turns, 1 if quick else 5, warmup=0 if quick else 1)
        yield Row(
            f"{family}: plain per-image, per-box reading / ours, {images} images × {boxes} boxes, {size} px, {classes} classes",
            *ratio(samples["plain"], samples["ours"]),
            at_least=GOAL,
            note=f"{samples['plain'].milliseconds} / {samples['ours'].milliseconds}; equal losses and gradients",
        )


def output(model: DenseDetector, images: int, size: int, classes: int, seed: int = 0) -> DenseOutput:
    """What a head might say: maps of logits around -3, boxes near those of the locations."""
    g = torch.Generator().manual_seed(seed)
    sizes = [-(-size // s) for s in LEVELS]

    def maps(channels: int) -> list[Tensor]:
        return [torch.randn(images, model.per_cell * channels, s, s, generator=g) for s in sizes]

    code = model.spec.box_code.kind
    if code == "points":
        boxes, quality = [m * 3 for m in maps(36)], None
    else:
        boxes = [m * 0.3 if code == "anchors" else m.abs() * 3 for m in maps(4)]
        quality = maps(1) if model.per_cell == 1 else None
    return model.assemble(Predictions([m - 3 for m in maps(classes)], boxes, quality), (size, size))


def with_backward(losses: Any, model: DenseDetector, out: DenseOutput, targets: Targets) -> list[Tensor]:
    """The losses, and their gradients in what the head says."""
    names = [name for name in ("cls_logits", "box_raw", "quality") if getattr(out, name) is not None]
    leaves = {name: getattr(out, name).detach().requires_grad_() for name in names}
    found = losses(model, replace(out, **leaves), targets)
    torch.stack(list(found.values())).sum().backward()
    return [value.detach() for value in found.values()] + [
        leaf.grad for leaf in leaves.values() if leaf.grad is not None
    ]


if __name__ == "__main__":
    run_script("dense_losses", "Losses of dense detectors against their plain reading", measure)
