"""GPU-hours and memory of the COCO recipes, from their FLOPs, their schedules and stated assumptions.

python -m benchmarks.scaling              the tables of docs/scaling.md (about a minute)
python -m benchmarks.scaling --measure    and step times on this machine, against which the FLOPs are held
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import cv2
import torch
from torch import Tensor, nn

from benchmarks.scenes import batch_of
from benchmarks.steps_of import total
from yoloxkd.assembly.models import architecture, build_detector, new_detector
from yoloxkd.assembly.recipes import resolve
from yoloxkd.config.recipe import Recipe
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.samples import TrainSamples
from yoloxkd.engine.multiscale import size_at
from yoloxkd.engine.step import TrainStep
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import KDConfig
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.nn.coco_names import COCO_NAMES
from yoloxkd.nn.complexity import complexity
from yoloxkd.nn.dense.dense_detector import DenseDetector

RECIPES = (
    "fgd-yolox-l-m",
    "pgd-yolox-l-m",
    "fgd-fcos-r101-r50",
    "pgd-fcos-r101-r50",
    "fgd-gfl-r101-r50",
    "pgd-gfl-r101-r50",
)
COCO_IMAGES = 118_287
WIDE = (800, 1344)
"""Height and width, px, of the papers' 1333 x 800 after padding: the largest batch there is."""

PADDING = 32
"""ImageColumns that keep their ratio are padded to multiples of this, px."""

BACKWARD = 2.0
"""FLOPs of a backward pass, in forward passes."""

DEVICES = {"V100": 125e12, "A100": 312e12, "H100": 989e12}
"""Peak of dense half-precision products, FLOP/s, as their maker gives it."""

USED = (0.05, 0.25)
"""Assumed share of that peak that training of a convolutional detector reaches."""

PROBE = 160
"""Side, px, at which activations are counted; they grow with the area."""


@dataclass(frozen=True)
class Budget:
    """What a recipe computes and holds.

    area      mean area that multi-scale training draws, over that of `size`; largest: the largest
    images    that are trained on in all; batch: of a step
    flops     of one image of `size`, forward
    states    numbers kept for each of the student's parameters: weight, gradient, momentum, average where there is one
    activations  bytes kept of one image of `size` between forward and backward pass, in float32
    """

    name: str
    size: tuple[int, int]
    area: float
    largest: float
    images: int
    batch: int
    student_flops: float
    teacher_flops: float
    student_parameters: int
    teacher_parameters: int
    states: int
    activations: float

    @property
    def plain(self) -> float:
        """FLOPs of the whole training without a teacher."""
        return self.images * self.area * self.student_flops * (1 + BACKWARD)

    @property
    def distilled(self) -> float:
        return self.plain + self.images * self.area * self.teacher_flops

    def memory(self, per_device: int, half: bool) -> float:
        """Bytes on one device at the largest size: the student's states, the teacher's weights, the student's activations."""
        numbers = 4 * (self.states * self.student_parameters + self.teacher_parameters)
        return numbers + per_device * self.activations * self.largest * (0.5 if half else 1.0)


def budget(name: str, size: tuple[int, int] | None = None) -> Budget:
    """A recipe's budget at its own size, or at another one (height, width)."""
    recipe = resolve(recipe=name)
    student = new_detector(recipe.student, COCO_NAMES)
    teacher = teacher_of(recipe)
    own = recipe.train.imgsz
    sides = (own, own) if isinstance(own, int) else tuple(PADDING * math.ceil(side / PADDING) for side in own)
    height, width = size or sides
    areas = drawn_areas(recipe, own, student.size_multiple) if isinstance(own, int) and size is None else [1.0]
    steps = recipe.train.epochs * (COCO_IMAGES // recipe.train.batch)
    return Budget(
        name,
        (height, width),
        math.fsum(areas) / len(areas),
        max(areas),
        steps * recipe.train.batch,
        recipe.train.batch,
        complexity(student, (height, width)).flops,
        complexity(teacher, (height, width)).flops,
        sum(p.numel() for p in student.parameters()),
        sum(p.numel() for p in teacher.parameters()),
        4 if recipe.ema.enabled else 3,
        activations(student, PROBE) * height * width / PROBE**2,
    )


def teacher_of(recipe: Recipe) -> DenseDetector:
    """The teacher's architecture; its weights do not matter here."""
    name = recipe.teacher.models[0].partition("@")[0]
    assert architecture(name)
    return build_detector({"name": name}, COCO_NAMES).eval()


def drawn_areas(recipe: Recipe, nominal: int, stride: int) -> list[float]:
    """Areas of the square sizes that multi-scale training draws, over the nominal one."""
    steps = recipe.augment.multiscale
    sizes = [size_at(i, imgsz=nominal, steps=steps, stride=stride, seed=0) for i in range(0, 20_000, 10)]
    return [(size / nominal) ** 2 for size in sizes]


def activations(student: DenseDetector, size: int) -> float:
    """Bytes that autograd keeps of one image of `size` px between forward and backward pass, in float32."""
    own = {t.untyped_storage().data_ptr() for t in (*student.parameters(), *student.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its address is not used twice
        return tensor

    batch = batch_of(1, 5, size)
    student.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = TrainStep(student, nn.ModuleDict())(batch)
        assert losses
    return float(sum(size for size, _ in kept.values()))


def tables(budgets: Sequence[Budget]) -> str:
    lines = [
        "| recipe | input | TFLOPs a step, plain | distilled | ratio | EFLOPs in all | "
        + " | ".join(f"{name} GPU-hours" for name in DEVICES)
        + " |"
    ]
    lines.append("|" + "---|" * (6 + len(DEVICES)))
    for b in budgets:
        steps = b.images / b.batch
        hours = [
            " to ".join(f"{b.distilled / peak / used / 3600:.0f}" for used in (USED[1], USED[0]))
            for peak in DEVICES.values()
        ]
        cells = [
            f"`{b.name}`",
            f"{b.size[1]}×{b.size[0]}",
            f"{b.plain / steps / 1e12:.3g}",
            f"{b.distilled / steps / 1e12:.3g}",
        ]
        cells += [f"{b.distilled / b.plain:.2f}", f"{b.distilled / 1e18:.3g}", *hours]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| recipe | input | images a GPU, of 8 | GiB, float32 | GiB, half precision | activations an image, MiB |",
        "|" + "---|" * 6,
    ]
    for b in budgets:
        each = b.batch // 8
        memory = [f"{b.memory(each, half) / 2**30:.1f}" for half in (False, True)]
        lines.append(
            f"| `{b.name}` | {b.size[1]}×{b.size[0]} | {each} | {memory[0]} | {memory[1]} | {b.activations / 2**20:.0f} |"
        )
    return "\n".join(lines)


def measure(name: str, size: int, images: int, rounds: int) -> str:
    """Processor seconds of a step without and with the teacher here, beside what the FLOPs say, and the share of the peak."""
    recipe = resolve(recipe=name)
    student = new_detector(recipe.student, COCO_NAMES).train().to(memory_format=torch.channels_last)
    teacher = teacher_of(recipe).to(memory_format=torch.channels_last)
    pairing = Pairing.between(student, teacher, size)
    methods = {key: DISTILLERS[key](cast("KDConfig", cfg), pairing) for key, cfg in recipe.kd.items()}
    kd = TeacherLosses(teacher, methods)
    batch = batch_of(images, 7, size)
    steps = {"plain": TrainStep(student, nn.ModuleDict()), "distilled": TrainStep(student, nn.ModuleDict({"kd": kd}))}
    seconds: dict[str, list[float]] = {"plain": [], "distilled": []}
    for turn in range(rounds + 1):
        for side, times in seconds.items():
            started = time.process_time()
            total(steps[side](batch)).backward()
            student.zero_grad(set_to_none=True)
            if turn:
                times.append(time.process_time() - started)
    plain, distilled = (sorted(times)[len(times) // 2] for times in seconds.values())
    ours, theirs = complexity(student, size).flops, complexity(teacher, size).flops
    flops = images * ours * (1 + BACKWARD)
    return (
        f"{name} at {size} px, {images} images: {plain:.2f} s plain, {distilled:.2f} s distilled of processor time; ratio "
        f"{distilled / plain:.2f}, by FLOPs {1 + theirs / (ours * (1 + BACKWARD)):.2f}; {flops / plain / 1e9:.0f} GFLOP/s, "
        f"{flops / plain / matmul_peak():.0%} of what a large matrix product reaches here"
    )


def sample_cost(name: str, data: str, samples: int = 60) -> str:
    """Processor time of one augmented training sample, and how many cores feed a device that computes at a rate."""
    recipe = resolve(recipe=name)
    images = load_split(find_data(data), "train")
    source = TrainSamples(images, recipe.train.imgsz, recipe.augment, seed=0)
    cv2.setNumThreads(1)
    assert source[0, 0, True]
    started = time.process_time()
    for index in range(samples):
        assert source[0, index % len(images), True]
    each = (time.process_time() - started) / samples
    return f"{name} on {data}: {1000 * each:.0f} ms of one core a training sample, {1 / each:.0f} samples/s a core"


def matmul_peak() -> float:
    """FLOP/s of a large float32 product by processor time of this process."""
    a = torch.rand(1536, 1536)
    best = 0.0
    for _ in range(5):
        started = time.process_time()
        a @ a
        best = max(best, 2 * 1536**3 / (time.process_time() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="step times on this machine as well")
    parser.add_argument("--data", default="shapes", help="whose training images are read for the cost of a sample")
    options = parser.parse_args()
    torch.manual_seed(0)
    found = [budget(name) for name in RECIPES]
    found += [budget(b.name, WIDE) for b in found if "yolox" not in b.name and b.size != WIDE]
    print(tables(found))
    if options.measure:
        for name in ("fgd-yolox-l-m", "pgd-fcos-r101-r50"):
            print(sample_cost(name, options.data))
        for name, size, images in (("fgd-yolox-l-m", 320, 2), ("pgd-yolox-l-m", 320, 2), ("pgd-fcos-r101-r50", 320, 2)):
            print(measure(name, size, images, rounds=3))


if __name__ == "__main__":
    main()
