"""What methods cost: loss and backward pass of each, as a part of a step of yolox-nano, and its memory.

Those that FGD and PGD compare with are in `kd_baselines`. `lad` has no loss: its labels cost an assignment, which is made anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.kd_losses import channels_last, maps_of
from benchmarks.peak_memory import high_water
from benchmarks.report import Row, run_script
from benchmarks.scenes import LEVELS, batch_of, dense_output, detector
from benchmarks.steps_of import training_step
from benchmarks.timing import Spread, alternate, ratio
from tests.losses import compared
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import Distiller
from yoloxkd.kd.defaults import kd_defaults, split_name
from yoloxkd.kd.pairing import Pairing
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.types import Batch, DenseOutput

IMAGES, BOXES, SIZE, WIDTH = 8, 30, 320, 96
GOALS: dict[str, float | None] = {
    "response": 0.15,
    "pkd": 0.15,
    "cwd": 0.15,
    "cwd@yolo": 0.15,
    "pgd": 0.15,
    "fgd": 0.15,
    "ld": 0.15,
    "mgd": None,
    "crosskd": None,
}
"""Of a step; MGD trains two 3x3 convolutions a level, CrossKD runs the teacher's head once more, forward and back to the student's
maps."""


def method_of(name: str, model: DenseDetector) -> Distiller:
    kind = DISTILLERS[split_name(name)[0]]
    pairing = Pairing.between(model, model)
    pairing = replace(pairing, levels=pairing.levels[: len(LEVELS)])  # of the scene; GFL has two more
    return kind(kind.Config.model_validate(kd_defaults(name, model.family)), pairing)


def once(method: Distiller, student: DenseOutput, teacher: DenseOutput, batch: Batch, model: DenseDetector) -> Tensor:
    """Loss, and its gradients of the student's maps and predictions and of the method's own parameters."""
    read = [*maps_of(method, student), student.cls_logits, student.box_raw, student.boxes, student.quality]
    wanted = [x.requires_grad_() for x in read if x is not None] + list(method.parameters())
    total = torch.stack(list(compared(method, student, teacher, batch, model).values())).sum()
    torch.autograd.grad(total, wanted, allow_unused=True)
    return total.detach()


def measure(quick: bool) -> Iterator[Row]:
    images, size = (2, 64) if quick else (IMAGES, SIZE)
    batch = batch_of(images, 6 if quick else BOXES, size)
    model = detector("yolox-tiny").eval().requires_grad_(False)
    turns: dict[str, Callable[[], object]] = {"step": training_step(detector("yolox-nano"), batch)}
    student, teacher = (channels_last(dense_output(images, size, seed, WIDTH)) for seed in (0, 1))
    gfl = detector("gfl-mobilenetv2", backbone_weights="none").eval().requires_grad_(False)
    for name in GOALS:
        if name == "ld":
            sides = (replace(out, box_raw=torch.randn(*out.boxes.shape[:2], 68)) for out in (student, teacher))
            turns[name] = partial(once, method_of(name, gfl), *sides, batch, gfl)
        else:
            turns[name] = partial(once, method_of(name, model), student, teacher, batch, model)
    samples = alternate(turns, 1 if quick else 9, warmup=0 if quick else 1)
    scene = f"{WIDTH} channels, {images} images × {BOXES} boxes, {size} px"
    maps = sum(m.nbytes for m in student.features) / 2**20
    for name, goal in GOALS.items():
        yield Row(
            f"{name} / a step of yolox-nano, {scene}",
            *ratio(samples[name], samples["step"]),
            at_most=goal,
            note=f"{samples[name].milliseconds} / {samples['step'].milliseconds}, without the teacher's forward pass",
        )
        yield Row(
            f"{name}: memory over that of the outputs, {scene}",
            Spread.of([high_water(turns[name])]),
            unit="MiB",
            note=f"the most that is alive at once, gradients included; one side's neck maps are {maps:.1f} MiB",
        )


if __name__ == "__main__":
    run_script("kd_methods", "Distillation methods: the losses", measure)
