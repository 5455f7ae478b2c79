"""YOLOX on one GPU: training steps beside pixeltable-yolox's, what distillation adds, losses alone, a run end to end.

Times are those of the device (events), each turn by itself, the median with its quartiles. Goals are in the table.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from benchmarks import loading
from benchmarks.peers import use_peers
from benchmarks.report import Row, run_script
from benchmarks.roofline import step_flops
from benchmarks.scenes import batch_of, dense_output, detector, targets_of
from benchmarks.steps_of import total, training_step
from benchmarks.timing import Spread
from benchmarks.train_step import official_step
from tests.losses import step_of
from yoloxkd import Trainer
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.nn.assigners.simota import simota
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.types import Batch, DenseOutput, Tap

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TITLE = "YOLOX on one GPU"
Turn = Callable[[], object]


def timed(turn: Turn, rounds: int, warmup: int = 5) -> list[float]:
    """Seconds of each turn on the device, the host waiting before each; peak memory counts from before the first."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = []
    for number in range(-warmup, rounds):
        if DEVICE.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            began.record()
            turn()
            ended.record()
            torch.cuda.synchronize()
            seconds = began.elapsed_time(ended) / 1e3
        else:
            started = time.perf_counter()
            turn()
            seconds = time.perf_counter() - started
        if number >= 0:
            found.append(seconds)
    return found


def ms(seconds: list[float]) -> Spread:
    return Spread.of([1e3 * value for value in seconds])


def peak_memory() -> str:
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most" if DEVICE.type == "cuda" else "no GPU"


def machine() -> Iterator[Row]:
    """What the device reaches at best: convolutions of large maps, and copies."""
    images, channels, side = (64, 256, 80) if DEVICE.type == "cuda" else (1, 16, 16)
    x = torch.randn(images, channels, side, side, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(channels, channels, 3, 3, device=DEVICE, dtype=torch.bfloat16)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    with torch.no_grad():
        seconds = timed(partial(F.conv2d, x, weight, padding=1), 20)
    peak = [2 * images * side**2 * channels**2 * 9 / s for s in seconds]
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    yield Row(
        f"bf16 convolution, 3x3, {channels} channels, {name}", Spread.of([p / 1e12 for p in peak]), unit="TFLOP/s"
    )
    source = torch.empty(2**30 if DEVICE.type == "cuda" else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), 20)
    rates = [2 * source.numel() / s / 1e9 for s in seconds]
    yield Row("memory: a copy, bytes read and written", Spread.of(rates), unit="GB/s")


def student_steps(quick: bool) -> Iterator[Row]:
    """Steps of the students alone, beside the peer's under its own autocast."""
    size, rounds = (64, 2) if quick else (640, 20)
    scenes = [("yolox-nano", 2)] if quick else [(n, b) for n in ("yolox-s", "yolox-m") for b in (32, 64)]
    for name, images in scenes:
        batch = batch_of(images, 4 if quick else 20, size).to(DEVICE)
        for precision in ("bf16",) if quick or images == 32 else ("bf16", "fp16"):
            amp = DTYPES[precision]
            scene = f"{name}, {size} px, {images} images, {precision}"
            theirs = timed(official_step(detector(name), name, batch, torch.contiguous_format, amp), rounds)
            their_memory = peak_memory()
            ours = timed(training_step(detector(name), batch, amp=amp), rounds)
            yield Row(
                f"official step / ours, {scene}",
                Spread.of([a / b for a, b in zip(theirs, ours, strict=True)]),
                at_least=1.3,
                note=f"{ms(theirs)} ms, {their_memory} / {ms(ours)} ms, {peak_memory()}; {images / ms(ours).median * 1e3:.0f} images/s",
            )
            if precision == "bf16" and images != 32:
                flops = step_flops(name, size, images)
                yield Row(
                    f"operations of our step a second, {scene}",
                    Spread.of([flops / s / 1e12 for s in ours]),
                    unit="TFLOP/s",
                    note="three forward passes; against the first row",
                )
                if not quick:
                    yield from compiled_step(name, batch, amp, ours, scene)


def compiled_step(name: str, batch: Batch, amp: torch.dtype, eager: list[float], scene: str) -> Iterator[Row]:
    torch._dynamo.reset()
    model = detector(name)
    step = training_step(model, batch, amp=amp)
    model.compile()
    started = time.perf_counter()
    step()
    first = time.perf_counter() - started
    found = timed(step, len(eager))
    yield Row(
        f"eager / compiled step, {scene}",
        Spread.of([a / b for a, b in zip(eager, found, strict=True)]),
        note=f"{ms(eager)} / {ms(found)} ms, {peak_memory()}; the first took {first:.0f} s",
    )


def distilled_steps(quick: bool) -> Iterator[Row]:
    """What a method adds to the student's step and the teacher's forward pass."""
    size, images, rounds = (64, 2, 2) if quick else (640, 64, 20)
    names = ("yolox-nano", "yolox-tiny") if quick else ("yolox-m", "yolox-l")
    batch, amp = batch_of(images, 4 if quick else 20, size).to(DEVICE), torch.bfloat16
    teacher = detector(names[1], 1).to(DEVICE, memory_format=torch.channels_last).eval().requires_grad_(False)

    @torch.no_grad()
    def forward() -> object:
        with torch.autocast(DEVICE.type, dtype=amp):
            return teacher(batch.images)

    alone, plain = timed(forward, rounds), timed(training_step(detector(names[0]), batch, amp=amp), rounds)
    for name in ("fgd", "pgd"):
        student = detector(names[0])
        method = DISTILLERS[name](DISTILLERS[name].Config(), Pairing.between(student, teacher))
        aux = nn.ModuleDict({"kd": TeacherLosses(teacher, {name: method})})
        found = timed(training_step(student, batch, aux, amp=amp), rounds)
        yield Row(
            f"{name} step / (student step + teacher forward), {names[0]} ← {names[1]}, {size} px, {images} images, bf16",
            Spread.of([a / (b + c) for a, b, c in zip(found, plain, alone, strict=True)]),
            at_most=1.10,
            note=f"{ms(found)} / ({ms(plain)} + {ms(alone)}) ms, {peak_memory()}",
        )
        yield from loss_alone(name, teacher, batch, plain, size, quick)


def loss_alone(
    name: str, teacher: DenseDetector, batch: Batch, plain: list[float], size: int, quick: bool
) -> Iterator[Row]:
    """A method's losses with their backward pass, over the student's step."""
    width = teacher.spec.channels[Tap.NECK][8]
    student, other = (moved(dense_output(len(batch.images), size, seed, width)) for seed in (0, 1))
    method = DISTILLERS[name](DISTILLERS[name].Config(), Pairing.between(teacher, teacher)).to(DEVICE)
    maps = [m for tap in method.needs for m in getattr(student, tap)]
    for m in maps:
        m.requires_grad_()

    step = step_of(student, other, batch, teacher)

    def run() -> None:
        torch.autograd.grad(total(method.compare(step)), maps)

    found = timed(run, 2 if quick else 20)
    floor = 3 * sum(m.numel() * m.element_size() for m in maps)
    yield Row(
        f"{name}: its losses alone / the student's step, {width} channels",
        Spread.of([a / b for a, b in zip(found, plain, strict=True)]),
        at_most=0.05,
        note=f"{ms(found)} ms; {floor / 1e9:.2f} GB: both maps read, a gradient written",
    )


def assignment(quick: bool) -> Iterator[Row]:
    size, images, boxes = (64, 2, 4) if quick else (640, 64, 30)
    out, targets = moved(dense_output(images, size)), targets_of(images, boxes, size).map(lambda x: x.to(DEVICE))
    found = timed(partial(simota, out, targets), 2 if quick else 20)
    floor = (out.cls_logits.numel() + out.boxes.numel() + out.cls_logits.shape[1] * images) * 4
    yield Row(
        f"SimOTA, {images} images × {boxes} boxes, {size} px",
        ms(found),
        unit="ms",
        note=f"{floor / 1e9:.2f} GB are read",
    )


def whole_run(quick: bool) -> Iterator[Row]:
    """`shapes`, generated, from image files to AP: what loader and evaluation leave of the steps' speed."""
    with tempfile.TemporaryDirectory() as folder:
        keys: dict[str, Any] = {"student": "yolox-nano" if quick else "yolox-s", "data": "shapes", "epochs": 1}
        keys |= {"imgsz": 64 if quick else 640, "batch": 2 if quick else 32, "device": DEVICE.type}
        started = time.perf_counter()
        sets = {"engine.workers": 0} if quick else {}
        trainer = Trainer(**keys, set=sets, out=Path(folder) / "run", console=Console(quiet=True))
        trainer.fit()
        seconds = time.perf_counter() - started
        lines = (Path(folder) / "run" / "results.csv").read_text().splitlines()
        column = lines[0].split(",").index("images_per_s")
        yield Row(
            f"an epoch of {keys['student']} on shapes, {keys['imgsz']} px",
            Spread.of([float(lines[-1].split(",")[column])]),
            unit="images/s",
            note=f"{seconds:.0f} s with start and evaluation",
        )


def moved(out: DenseOutput) -> DenseOutput:
    """The output on the device, maps in channels_last."""
    from tests.cuda.test_as_on_the_cpu import moved as to_device

    found: DenseOutput = to_device(out)
    return found


def measure(quick: bool) -> Iterator[Row]:
    if DEVICE.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = True
    yield from machine()
    yield from assignment(quick)
    yield from distilled_steps(quick)
    use_peers()
    yield from student_steps(quick)
    yield from whole_run(quick)
    yield from loading.measure(quick, between=False)


if __name__ == "__main__":
    run_script("gpu", TITLE, measure)
