"""The losses of PGD and FGD with their backward pass, against their plain reading and against what they are added to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.report import Row, run_script
from benchmarks.scenes import batch_of, dense_output, detector
from benchmarks.steps_of import training_step
from benchmarks.timing import alternate, ratio
from tests.kd.plain import fgd_by_object, pgd_by_object
from tests.losses import compared
from yoloxkd.kd.base import Distiller
from yoloxkd.kd.methods.fgd import FGD, FGDConfig
from yoloxkd.kd.methods.pgd import PGD, PGDConfig
from yoloxkd.kd.pairing import Pairing
from yoloxkd.types import DenseOutput

IMAGES, BOXES, SIZE = 8, 30, 320
PLAIN = {"pgd": pgd_by_object, "fgd": fgd_by_object}
GOALS = {"pgd": (4, 0.12), "fgd": (2, 0.07)}


def measure(quick: bool) -> Iterator[Row]:
    images, size = (2, 64) if quick else (IMAGES, SIZE)
    batch, rounds = batch_of(images, 6 if quick else BOXES, size), 1 if quick else 15
    step = training_step(detector("yolox-nano"), batch)
    for width, of in ((96, "yolox-tiny"), (256, "yolox-l"))[: 1 if quick else 2]:
        model = detector(of)
        student, teacher = (channels_last(dense_output(images, size, seed, width)) for seed in (0, 1))
        for name, method in methods(model).items():
            turns = {
                "ours": partial(with_backward, partial(compared, method), method, student, teacher, batch, model),
                "plain": partial(with_backward, partial(PLAIN[name], method), method, student, teacher, batch, model),
                "step": step,
                "once": partial(once, method, student, teacher),
            }
            torch.testing.assert_close(turns["ours"](), turns["plain"](), rtol=1e-3, atol=1e-4)
            samples = alternate(turns, rounds, warmup=0 if quick else 1)
            over, share = GOALS[name]
            scene = f"{width} channels, {images} images × {BOXES} boxes, {size} px"
            ours = samples["ours"]
            yield Row(
                f"{name}: plain per-image, per-box reading / ours, {scene}",
                *ratio(samples["plain"], ours),
                at_least=over,
                note=f"{samples['plain'].milliseconds} / {ours.milliseconds}; equal loss and gradient",
            )
            yield Row(
                f"{name}: ours / a step of yolox-nano, {scene}",
                *ratio(ours, samples["step"]),
                at_most=share if width == 96 else None,
                note=f"{ours.milliseconds} / {samples['step'].milliseconds}",
            )
            yield Row(
                f"{name}: ours / reading both maps and writing a gradient once, {scene}",
                *ratio(ours, samples["once"]),
                at_most=2 if name == "fgd" else None,
                note=f"{ours.milliseconds} / {samples['once'].milliseconds}",
            )


def methods(model: torch.nn.Module) -> dict[str, Distiller]:
    pairing = Pairing.between(model, model)
    return {"pgd": PGD(PGDConfig(), pairing), "fgd": FGD(FGDConfig(), pairing)}


def channels_last(out: DenseOutput) -> DenseOutput:
    """Maps in the layout that training gives them."""
    for tap in ("features", "cls_features", "reg_features"):
        setattr(out, tap, tuple(m.contiguous(memory_format=torch.channels_last) for m in getattr(out, tap)))
    return out


def maps_of(method: Distiller, out: DenseOutput) -> list[Tensor]:
    return [m for tap in method.needs for m in getattr(out, tap)]


def with_backward(
    compare: Callable[..., dict[str, Tensor]], method: Distiller, student: DenseOutput, *args: object
) -> Tensor:
    """Loss, gradient with respect to the student's maps and the method's own parameters."""
    wanted = [m.requires_grad_() for m in maps_of(method, student)] + list(method.parameters())
    total = torch.stack(list(compare(student, *args).values())).sum()
    grads = torch.autograd.grad(total, wanted)
    return torch.stack([total.detach(), *(g.norm() for g in grads[: len(maps_of(method, student))])])


@torch.no_grad()
def once(method: Distiller, student: DenseOutput, teacher: DenseOutput) -> None:
    """Both sides' maps read, and a gradient of the student's written."""
    for s, t in zip(maps_of(method, student), maps_of(method, teacher), strict=True):
        torch.sub(s, t)


if __name__ == "__main__":
    run_script("kd_losses", "PGD and FGD: the losses", measure)
