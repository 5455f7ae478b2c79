"""Measured batch size (`batch: auto`): how many images a step fit into memory, by trial steps of the run itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yoloxkd.assembly.batch import takes_one_image
from yoloxkd.assembly.models import CheckpointFiles, new_detector
from yoloxkd.assembly.run import distillation
from yoloxkd.assembly.teachers import open_teachers
from yoloxkd.config.recipe import Recipe
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.sufficiency import refuse_shortage, shortages
from yoloxkd.distributed import comm
from yoloxkd.engine.callback_list import CallbackList
from yoloxkd.engine.device import choose_device, settings
from yoloxkd.engine.events import State
from yoloxkd.engine.failures import is_out_of_memory
from yoloxkd.engine.memory import Memory
from yoloxkd.engine.stepper import Stepper
from yoloxkd.errors import UserError
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.fake_quantization import fake_quantize
from yoloxkd.types import Batch, Targets

FILLED = 0.8
"""The part of the available memory that is filled at most."""
SECONDS = 60
"""No further trial begins when half of this has passed."""
TRIALS = (1, 2, 4, 8)
STEPS = 8
"""An epoch should have so many."""
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Images of one process and part that are chosen from."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What trial steps found in one process.

    peaks      {images: bytes at the highest, above what was in use before}
    available  bytes; fits: images that fill at most `FILLED` of them, by a straight line through the last two trials
    """

    peaks: dict[int, int]
    available: int
    fits: int


def with_measured_batch(recipe: Recipe, files: CheckpointFiles | None = None) -> tuple[Recipe, str]:
    """The recipe with a measured number of images a step, and the sentence that says why."""
    with comm.all_or_none():
        measured = measure(recipe, files)
        if measured.fits < 1:
            images, bytes_ = next(iter(measured.peaks.items()))
            raise UserError(
                f"batch auto: not even one image a step fits: {images} took {_gb(bytes_)} of the {_gb(measured.available)} "
                f"available, of which at most {FILLED:.0%} are filled; lower --imgsz, or use --amp or a smaller model"
            )
    least = min(comm.gather(measured), key=lambda m: m.fits)
    share, reason = _choose(recipe, least.fits, comm.world_size())
    batch = share * recipe.train.accumulate * comm.world_size()
    train = recipe.train.model_copy(update={"batch": batch, "measure_batch": False})
    return recipe.model_copy(update={"train": train}), _sentence(recipe, least, batch, share, reason)


def _choose(recipe: Recipe, fits: int, processes: int) -> tuple[int, str]:
    """Images of one process and part, and what limits them."""
    images = len(load_split(find_data(recipe.data), "train"))
    limits = {
        f"which {fits} images would do": fits,
        f"{SIZES[-1]} is the most that is chosen": SIZES[-1],
        f"{images} training images should make {STEPS} steps an epoch": max(
            1, images // (processes * recipe.train.accumulate * STEPS)
        ),
    }
    reason = min(limits, key=lambda name: limits[name])
    return max(size for size in SIZES if size <= limits[reason]), reason


def _sentence(recipe: Recipe, measured: Measured, batch: int, share: int, reason: str) -> str:
    parts = comm.world_size() * recipe.train.accumulate
    spread = f" ({parts} x {share})" if parts > 1 else ""
    teachers = f", {' and '.join(recipe.kd)} with {len(recipe.teacher.models)} teacher(s) included" if recipe.kd else ""
    trials = ", ".join(map(str, measured.peaks))
    return (
        f"batch auto: {batch} images a step{spread}; steps of {trials} image(s) took up to "
        f"{_gb(max(measured.peaks.values()))}{teachers}, {_gb(_slope(measured.peaks))} an image; at most {FILLED:.0%} of "
        f"{_gb(measured.available)} available are filled; {reason}"
    )


def measure(recipe: Recipe, files: CheckpointFiles | None = None) -> Measured:
    """Trial steps in this process alone, until half of `SECONDS` has passed or the next might not fit."""
    began = time.monotonic()
    device = choose_device(recipe.engine.device)
    data = load_split(find_data(recipe.data), "train")
    refuse_shortage(shortages(data, imgsz=recipe.train.imgsz), lambda line: None)  # the run itself says the warnings
    memory = Memory(device, comm.local_ranks().local_world_size)
    with comm.single_process(), settings(recipe.engine, device, few_sizes=isinstance(recipe.train.imgsz, int)):
        step, size, student = _trial(recipe, data, device, files)
        least = 1 if takes_one_image(student, size) else 2
        rows = _rows(recipe, data)
        peaks: dict[int, int] = {}
        for images in TRIALS[least - 1 :]:
            if peaks and (
                time.monotonic() - began > SECONDS / 2 or 2 * max(peaks.values()) > FILLED * memory.available
            ):
                break
            try:
                if not peaks:
                    step(_batch(images, size, rows, student.spec.masks))  # momentum and caches come with the first step
                memory.restart()
                step(_batch(images, size, rows, student.spec.masks))
            except UserError as error:
                if error.__cause__ is None or not is_out_of_memory(error.__cause__):
                    raise
                peaks.setdefault(images, memory.available)
                break
            peaks[images] = memory.peak()
        del step, student
        memory.free()
    images, high = list(peaks.items())[-1]
    slope = _slope(peaks)
    return Measured(peaks, memory.available, int(images + (FILLED * memory.available - high) // slope))


def _slope(peaks: dict[int, int]) -> float:
    """Bytes an image, from the last two trials; with one trial, or where memory was there already, from the last alone."""
    (images, high), *before = list(peaks.items())[::-1]
    if before and high > before[0][1]:
        return (high - before[0][1]) / (images - before[0][0])
    return max(high, 1) / images


def _trial(
    recipe: Recipe, data: DetectionData, device: torch.device, files: CheckpointFiles | None
) -> tuple[Callable[[Batch], None], int, Detector[Any, Any]]:
    """A function that makes a step of this training, the largest size (px) that the training has, and the student."""
    student = new_detector(recipe.student, find_data(recipe.data).names)
    imgsz, multiple = recipe.train.imgsz, student.size_multiple
    # images that lie and stand in one batch fill a square of the long side
    size = -(-imgsz[1] // multiple) * multiple if isinstance(imgsz, tuple) else imgsz
    size += recipe.augment.multiscale[1] * multiple
    trial_recipe = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"imgsz": size, "accumulate": 1}),
            "augment": recipe.augment.model_copy(update={"multiscale": (0, 0)}),
            "teacher": recipe.teacher.model_copy(update={"min_ap": 0.0}),
        }
    )
    if recipe.quantize.kind != "off":
        fake_quantize(student, recipe.quantize.weight_bits)
    state = State(
        recipe=trial_recipe,
        detector=student,
        device=device,
        out=Path(),
        epochs=recipe.train.epochs,
        iters_per_epoch=1,
        say=lambda line: None,
        evaluate=lambda model, limit: {},
        val=data,
    )
    teachers = open_teachers(recipe.teacher, student.names, state.say, files)
    state.callbacks = CallbackList(distillation(trial_recipe, teachers, state.say))
    stepper = Stepper(state)
    stepper.set_up()
    student.final_phase(True)  # the heavier one
    student.train()
    return stepper.step, size, student


def _rows(recipe: Recipe, data: DetectionData) -> int:
    """Boxes of the fullest image there can be: a mosaic of four that have the most, blended with one more."""
    most = int(np.diff(data.offsets).max(initial=1))
    return most * ((4 if recipe.augment.mosaic else 1) + (1 if recipe.augment.mixup else 0))


def _batch(images: int, size: int, rows: int, masks: bool = False) -> Batch:
    """Noise with as many boxes as an image can have, and their masks where the student trains some."""
    g = torch.Generator().manual_seed(0)
    low = torch.rand(images, rows, 2, generator=g) * (size * 0.6)
    high = low + size * (0.05 + 0.35 * torch.rand(images, rows, 2, generator=g))
    mask = torch.ones(images, rows, dtype=torch.bool)
    targets = Targets(torch.cat([low, high], -1), torch.zeros_like(mask, dtype=torch.int64), mask, ~mask)
    if masks:
        targets.masks = torch.ones(images, rows, size, size, dtype=torch.bool)
    pixels = torch.randint(0, 256, (images, 3, size, size), generator=g, dtype=torch.uint8)
    return Batch(pixels, targets, torch.tensor([[0.0, 0.0, size, size]]).repeat(images, 1))


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
