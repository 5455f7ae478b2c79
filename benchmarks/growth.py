"""How time an image grows with the batch, with the boxes of an image and with its area: fitted exponents.

At 1, 2, 4 and 8 times the smallest, in alternating turns; an exponent is the slope of log time an image over log size, 0
where time does not depend on it and 1 where it is proportional.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kd_losses import channels_last, maps_of, methods, with_backward
from benchmarks.report import Row, run_script
from benchmarks.scenes import batch_of, dense_output, detector
from benchmarks.steps import turn
from benchmarks.steps_of import total
from benchmarks.timing import Samples, Spread, alternate
from tests.losses import compared
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.types import Batch, DenseOutput

BASE = {"batch": 2, "boxes": 12, "area": 224**2}
TIMES = (1, 2, 4, 8)
LIMITS = {"batch": 0.05, "boxes": 1.0, "area": 1.05}
"""Flat, and linear or better, as far as such a fit can tell."""


def task_losses(model: DenseDetector, out: DenseOutput, batch: Batch) -> Tensor:
    """Assignment, losses, and the gradient of the predictions."""
    wanted = [x.requires_grad_() for x in (out.cls_logits, out.box_raw, out.quality) if x is not None]
    loss = total(model.losses(out, batch.targets, model.assign(out, batch.targets)))
    torch.autograd.grad(loss, wanted)
    return loss.detach()


def part(what: str, model: DenseDetector, images: int, boxes: int, size: int) -> Callable[[], object]:
    batch = batch_of(images, boxes, size)
    if what == "step":
        return turn("pgd", "yolox-nano", "yolox-tiny", batch)
    outs = [channels_last(dense_output(images, size, seed, 96)) for seed in (0, 1)]
    if what == "task losses":
        return partial(task_losses, model, outs[0], batch)
    method = methods(model)[what]
    assert maps_of(method, outs[0])
    return partial(with_backward, partial(compared, method), method, outs[0], outs[1], batch, model)


def exponents(samples: dict[int, Samples], sizes: dict[int, float], images: dict[int, int]) -> tuple[Spread, Spread]:
    """The slopes of each round, by wall and by CPU time."""
    found = []
    for clock in ("wall", "cpu"):
        rounds = zip(*(getattr(samples[n], clock) for n in sizes), strict=True)
        found.append(
            Spread.of([slope(sizes.values(), [t / images[n] for n, t in zip(sizes, r, strict=True)]) for r in rounds])
        )
    return found[0], found[1]


def slope(sizes: object, seconds: list[float]) -> float:
    x, y = ([math.log(v) for v in values] for values in (sizes, seconds))  # type: ignore[attr-defined]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def measure(quick: bool) -> Iterator[Row]:
    model = detector("yolox-tiny")
    times = TIMES[:2] if quick else TIMES
    for what in ("task losses",) if quick else ("task losses", "fgd", "pgd", "step"):
        for grows in ("batch",) if quick else BASE:
            turns, sizes, images = {}, {}, {}
            for n in times:
                scene = BASE | {grows: BASE[grows] * n}
                side = round(math.sqrt(scene["area"]) / 32) * 32
                sizes[n] = float(side**2 if grows == "area" else scene[grows])
                images[n] = scene["batch"]
                turns[n] = part(what, model, scene["batch"], scene["boxes"], side)
            rounds = 1 if quick else 3 if what == "step" else 9
            named = alternate({str(n): turn for n, turn in turns.items()}, rounds)
            samples = {n: named[str(n)] for n in turns}
            each = ", ".join(f"{samples[n].seconds / images[n] * 1e3:.3g}" for n in times)
            yield Row(
                f"{'distilled step of yolox-nano under yolox-tiny' if what == 'step' else what}: exponent in {grows}",
                *exponents(samples, sizes, images),
                at_most=LIMITS[grows],
                unit="",
                note=f"ms an image at {', '.join(f'{n}×' for n in times)}: {each}",
            )


if __name__ == "__main__":
    run_script("growth", "Growth: exponents of the time an image takes", measure)
