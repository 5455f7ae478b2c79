"""What distillation adds to a step: over the student's own step and the teacher's forward pass, in time and in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.report import Row, run_script
from benchmarks.scenes import batch_of, detector
from benchmarks.steps_of import training_step
from benchmarks.timing import Spread, alternate, ratio, ratio_to_sum
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import TeacherLosses
from yoloxkd.kd.pairing import Pairing
from yoloxkd.types import Batch

PAIRS = {
    # student, teacher: px -> images, rounds
    ("yolox-nano", "yolox-tiny"): {320: (8, 8), 640: (2, 8)},
    ("yolox-m", "yolox-l"): {320: (2, 4), 640: (1, 3)},
}
MEMORY_IMAGES, BOXES = 8, 30
MODES = ("step", "teacher", "fgd", "pgd")


def turn(mode: str, student: str, teacher: str, batch: Batch) -> Callable[[], object]:
    """One side: the student's step, the teacher's forward pass, or the step of a distiller."""
    if mode == "step":
        return training_step(detector(student), batch)
    model = detector(teacher, 1).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    if mode == "teacher":
        return partial(forward, model, batch.images)
    own = detector(student)
    torch.manual_seed(0)
    method = DISTILLERS[mode](DISTILLERS[mode].Config(), Pairing.between(own, model))
    return training_step(own, batch, nn.ModuleDict({"kd": TeacherLosses(model, {mode: method})}))


@torch.no_grad()
def forward(model: nn.Module, images: Tensor) -> object:
    return model(images)


def measure(quick: bool) -> Iterator[Row]:
    pairs = {("yolox-nano", "yolox-tiny"): {64: (1, 1)}} if quick else PAIRS
    for (student, teacher), sizes in pairs.items():
        for size, (images, rounds) in sizes.items():
            batch = batch_of(images, 8 if quick else BOXES, size)
            turns = {mode: turn(mode, student, teacher, batch) for mode in MODES}
            samples = alternate(turns, rounds, warmup=0 if quick else 1)
            for method in ("fgd", "pgd"):
                yield Row(
                    f"{method} step / (student step + teacher forward), {student} ← {teacher}, {size} px, {images} images",
                    *ratio_to_sum(samples[method], [samples["step"], samples["teacher"]]),
                    at_most=1.10,
                    note=f"{samples[method].milliseconds} / "
                    f"({samples['step'].milliseconds} + {samples['teacher'].milliseconds})",
                )
            yield Row(
                f"teacher forward / student step, {student} ← {teacher}, {size} px, {images} images",
                *ratio(samples["teacher"], samples["step"]),
            )
    if not quick:
        yield from memory()


def memory() -> Iterator[Row]:
    """The most that a step holds at once over what was there before it, nano under tiny."""
    size = 320
    found = {mode: peak(mode, size) for mode in MODES if mode != "teacher"}
    for method in ("fgd", "pgd"):
        allowed = found["step"]["peak"] + found[method]["teacher"] + 1.3 * found[method]["maps"]
        yield Row(
            f"{method}: peak memory / (student step + teacher weights + 1.3 tapped maps), yolox-nano ← yolox-tiny, {size} px",
            Spread.of([(found[method]["peak"] + found[method]["teacher"]) / allowed]),
            at_most=1.0,
            note=f"({found[method]['peak']:.0f} MiB + teacher) / ({found['step']['peak']:.0f} + teacher + 1.3 · "
            f"{found[method]['maps']:.0f}), teacher {found[method]['teacher']:.0f}; live tensors of a step, by the "
            "allocator's events",
        )


def peak(mode: str, size: int) -> dict[str, float]:
    """MiB in a process of its own: the step's peak of live tensors, the teacher's weights, the tapped maps of both."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", mode, str(size), str(MEMORY_IMAGES), str(BOXES)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


if __name__ == "__main__":
    run_script("steps", "What distillation adds to a step", measure)
