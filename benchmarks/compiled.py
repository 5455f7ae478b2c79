"""`engine.compile` on this machine: the distilled step with both networks compiled, and what compiling them takes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.report import Row, run_script
from benchmarks.scenes import batch_of, detector
from benchmarks.steps_of import training_step
from benchmarks.timing import Spread, alternate, ratio
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import TeacherLosses
from yoloxkd.kd.pairing import Pairing

WIDTH, SIZE, IMAGES = 0.125, 128, 4


def measure(quick: bool) -> Iterator[Row]:
    batch, turns = batch_of(IMAGES, 4, SIZE), {}
    for name in ("eager", "compiled"):
        student, teacher = (detector("yolox-nano", width=WIDTH * k) for k in (1, 2))
        teacher.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        method = DISTILLERS["pgd"](DISTILLERS["pgd"].Config(), Pairing.between(student, teacher))
        if name == "compiled":
            for model in (student, teacher):
                model.compile(backend="eager" if quick else "inductor")
        turns[name] = training_step(student, batch, nn.ModuleDict({"kd": TeacherLosses(teacher, {"pgd": method})}))
    started = time.perf_counter()
    turns["compiled"]()
    seconds = time.perf_counter() - started
    scene = f"yolox-nano of width {WIDTH} under width {2 * WIDTH}, {SIZE} px, {IMAGES} images"
    yield Row(f"first step with engine.compile, {scene}", Spread.of([seconds]), unit="s")
    samples = alternate(turns, 1 if quick else 10)
    yield Row(
        f"eager / compiled step (later ones), {scene}",
        *ratio(samples["eager"], samples["compiled"]),
        note=f"{samples['eager'].milliseconds} / {samples['compiled'].milliseconds}",
    )


if __name__ == "__main__":
    run_script("compiled", "torch.compile for student and teacher", measure)
