"""A run's student rounded as an int8 file will be, with ranges from its training images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yoloxkd.assembly.models import CheckpointFiles, Opened
from yoloxkd.config.recipe import Recipe
from yoloxkd.data.augment.transforms import network_input
from yoloxkd.data.dataset import DetectionData
from yoloxkd.engine.callbacks.activation_ranges import ActivationRanges
from yoloxkd.errors import UserError
from yoloxkd.kd.pairing import match_classes
from yoloxkd.nn.conv_followers import evaluating
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.fake_quantization import fake_quantize, observe, quantized_layers
from yoloxkd.nn.weights.load import LoadReport

AT_ONCE = 8
"""Images of which a range is measured together, as in a small batch of the training."""


def check_start(recipe: Recipe, report: LoadReport, files: CheckpointFiles, say: Callable[[str], None]) -> None:
    """UserError: the weights that a student for int8 starts from leave its class predictors untrained."""
    weights = recipe.student.weights
    if recipe.quantize.kind == "off":
        if weights is not None and files.read(weights).quantize is not None:
            say(
                f"warning: {weights} was trained for int8; this run goes on in float32 and does not use its ranges, give "
                "--quantize int8 to stay with int8"
            )
    elif report.class_predictors_skipped or report.missing:
        raise UserError(
            f"--quantize {recipe.quantize.kind} rounds a student that is trained already, and {weights} leaves a part of it "
            f"untrained on this data ({report.describe()}); train it here first, and give that run's best.pt"
        )


def quantized(
    student: Detector[Any, Any],
    recipe: Recipe,
    teachers: Sequence[Opened],
    train: DetectionData | None,
    device: torch.device,
    say: Callable[[str], None],
) -> list[ActivationRanges]:
    """Fake-quantize the student where the recipe asks for it, in place; returns the callback that moves its ranges.

    train  images that the first ranges follow from; None: the state of a resumed run has them
    UserError: a teacher has other classes than the student.
    """
    section = recipe.quantize
    if section.kind == "off":
        return []
    for teacher in teachers:
        names = teacher.detector.names
        if len(names) != len(student.names) or not bool((match_classes(names, student.names) >= 0).all()):
            raise UserError(
                f"--quantize {section.kind} learns from the student in float32, and teacher {teacher.weights.path} has the "
                f"classes {', '.join(names[:6])}{', ...' if len(names) > 6 else ''} where the student has "
                f"{', '.join(student.names[:6])}; give a teacher of the same classes, such as the student's own checkpoint"
            )
    fake_quantize(student, section.weight_bits)
    if train is not None:
        with evaluating(student):
            observe(student.to(device), _batches(train, recipe, student, device))
    say(
        f"int8: {len(quantized_layers(student))} convolutions, {section.weight_bits}-bit weights, 8-bit inputs and outputs; "
        f"ranges move for the first {section.freeze:.0%} of the steps"
    )
    return [ActivationRanges(section.momentum, section.freeze)]


def _batches(
    data: DetectionData, recipe: Recipe, student: Detector[Any, Any], device: torch.device
) -> Iterator[Tensor]:
    """Images evenly spread over the data, letterboxed; together where they have one size."""
    count = min(recipe.quantize.images, len(data))
    waiting: list[np.ndarray] = []
    for index in np.unique(np.linspace(0, len(data) - 1, count).round().astype(int)).tolist():
        pixels = network_input(
            data.read(index), recipe.train.imgsz, student.size_multiple, student.spec.input.pad_value
        )[0]
        if waiting and (len(waiting) == AT_ONCE or waiting[0].shape != pixels.shape):
            yield _tensor(waiting, device)
            waiting = []
        waiting.append(pixels)
    yield _tensor(waiting, device)


def _tensor(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))).to(device)
