"""The losses that FGD and PGD compare with, forward and backward, against their plain reading and a step of yolox-nano."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kd_losses import BOXES, IMAGES, SIZE, channels_last
from benchmarks.peak_memory import high_water
from benchmarks.report import Row, run_script
from benchmarks.scenes import batch_of, dense_output, detector
from benchmarks.steps_of import training_step
from benchmarks.timing import Spread, alternate, ratio
from tests.kd.plain_baselines import PLAIN
from tests.losses import step_of
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import Distiller, Step
from yoloxkd.kd.defaults import kd_defaults
from yoloxkd.kd.pairing import Pairing
from yoloxkd.types import DenseOutput, Tap

LOOPING = ("fgfi", "defeat", "tadf", "gid", "chen", "mimic")
"""Methods whose plain reading goes through boxes; the others' goes through images and levels alone."""
SHARE = 0.15
PREDICTIONS = ("cls_logits", "quality", "boxes")


def measure(quick: bool) -> Iterator[Row]:
    images, size = (2, 64) if quick else (IMAGES, SIZE)
    batch, rounds = batch_of(images, 6 if quick else BOXES, size), 1 if quick else 9
    model, width = detector("yolox-tiny"), 96
    student_step = training_step(detector("yolox-nano"), batch)
    student, teacher = (channels_last(dense_output(images, size, seed, width)) for seed in (0, 1))
    step = step_of(student, teacher, batch, model)
    for name, plain in PLAIN.items():
        torch.manual_seed(0)
        keys = DISTILLERS[name].Config.model_validate(kd_defaults(name, model.family))
        method = DISTILLERS[name](keys, Pairing.between(model, model))
        turns = {
            "ours": partial(with_backward, partial(own_terms, method), method, step),
            "plain": partial(with_backward, partial(plain, method), method, step),
            "step": student_step,
        }
        torch.testing.assert_close(turns["ours"](), turns["plain"](), rtol=1e-3, atol=1e-4)
        samples = alternate(turns, rounds, warmup=0 if quick else 1)
        ours = samples["ours"]
        scene = f"{width} channels, {images} images × {BOXES} boxes, {size} px"
        yield Row(
            f"{name}: plain per-image{', per-box' if name in LOOPING else ''} reading / ours, {scene}",
            *ratio(samples["plain"], ours),
            at_least=3 if name in LOOPING else None,
            note=f"{samples['plain'].milliseconds} / {ours.milliseconds}; equal loss and gradient",
        )
        yield Row(
            f"{name}: ours / a step of yolox-nano, {scene}",
            *ratio(ours, samples["step"]),
            at_most=SHARE,
            note=f"{ours.milliseconds} / {samples['step'].milliseconds}",
        )
        yield Row(
            f"{name}: memory over that of the outputs, {scene}",
            Spread.of([high_water(turns["ours"])]),
            unit="MiB",
            note="the most that is alive at once, gradients included",
        )


def own_terms(method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
    return {str(name): loss.mean() for name, loss in method.compare(step).items()}


def with_backward(
    terms: Callable[[Step[DenseOutput]], dict[str, Tensor]], method: Distiller, step: Step[DenseOutput]
) -> Tensor:
    """Loss and the norms of its gradients, with respect to the student's maps, its predictions and the method's own weights."""
    maps = [m for tap in Tap if tap in method.needs for m in getattr(step.student, tap)]
    wanted = [x.requires_grad_() for x in (*maps, *(getattr(step.student, name) for name in PREDICTIONS))]
    total = torch.stack(list(terms(step).values())).sum()
    grads = torch.autograd.grad(total, wanted + list(method.parameters()), allow_unused=True)
    zero = torch.zeros(())  # a level that no region is pooled from has no gradient, or a gradient of zeros
    return torch.stack([total.detach(), *(zero if grad is None else grad.norm() for grad in grads)])


if __name__ == "__main__":
    run_script("kd_baselines", "The losses that FGD and PGD compare with", measure)
