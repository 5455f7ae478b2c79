"""Compare any program that reads images and prints detections with a checkpoint, by the gate of exported files."""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from yoloxkd.data.augment.transforms import letterbox
from yoloxkd.data.dataset import DetectionData
from yoloxkd.errors import GateError, UserError
from yoloxkd.exporters.accuracy import Detect, average_precisions
from yoloxkd.exporters.matching import Candidates, PrintedMasks, Suppression, compare
from yoloxkd.exporters.parity import AP_IMAGES, IMAGES, NO_AP, Reference
from yoloxkd.exporters.parity_report import TOLERANCES, ParityReport
from yoloxkd.instance_masks import decode_rle
from yoloxkd.nn.detector import Detector
from yoloxkd.types import Detections


class Mask(BaseModel):
    """COCO's run lengths, compressed or not: height and width px of the image, and the runs down its columns."""

    size: Annotated[list[int], Field(min_length=2, max_length=2)]
    counts: list[int] | str


class Row(BaseModel):
    """One detection as a runner prints it: box xyxy px of the image, score, label; its mask where the engine gives any."""

    model_config = ConfigDict(allow_inf_nan=False)

    box: Annotated[list[float], Field(min_length=4, max_length=4)]
    score: float = Field(ge=0, le=1)
    label: int = Field(ge=0)
    name: str | None = None
    mask: Mask | None = None


class RunnerImage(BaseModel):
    """Of one image: its path as it was given, and its detections."""

    image: str
    detections: list[Row]


def check_runner(
    detector: Detector[Any, Any],
    command: str,
    data: DetectionData,
    *,
    imgsz: int,
    precision: str,
    settings: Suppression,
) -> ParityReport:
    """Run `command IMAGE...` on images of `data` and compare what it prints with what the model detects.

    command    words as in a shell; it prints what `export/predict.py` prints: [{image, detections: [{box, score, label}]}],
               each with its `mask` where the model gives masks; a command that prints none is compared by its boxes
    imgsz      px, of the model's input; the runner's should be the same, with the same letterbox
    precision  fp32, fp16 or int8: whose tolerance holds
    settings   what the runner's NMS is set to

    The images are PNG files, so that both sides see the same pixels. GateError: they differ; UserError: the command
    fails, or prints something else, or AP is to judge int8 and the images hold no object of the model's classes.
    """
    tolerance = TOLERANCES[precision]
    count = IMAGES if tolerance.ap is None else AP_IMAGES
    indices = np.unique(np.linspace(0, max(len(data) - 1, 0), min(count, len(data))).round().astype(int)).tolist()
    images = [data.read(i) for i in indices]
    printed = _run(command, images, detector.names)
    model, report = Reference(detector), ParityReport(tolerance, images=len(images))
    with_masks = detector.spec.masks and any(row.mask for rows in printed for row in rows)
    report.masks_left_out = detector.spec.masks and not with_masks
    of_model: list[Detections] = []
    of_runner: list[Detections] = []
    for image, rows in zip(images, printed, strict=True):
        pixels, scale, _, _ = letterbox(image, (imgsz, imgsz), detector.spec.input.pad_value)
        boxes, scores, levels = model(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]))
        expected = model.detections(settings)[0]
        detections = _detections(rows, scale)
        if with_masks:
            masks = _masks(rows, image.shape[:2], command)
            detections.soft_masks = PrintedMasks(masks, expected.boxes / np.float32(scale))
        else:
            expected.soft_masks = None
        content = (image.shape[0] * scale, image.shape[1] * scale)
        limit = np.array([content[1], content[0]] * 2, np.float32)
        expected.boxes, detections.boxes = expected.boxes.clip(0, limit), detections.boxes.clip(0, limit)
        candidates = Candidates(boxes[0].numpy().clip(0, limit), scores[0].numpy(), (imgsz, imgsz), levels)
        compare(report.found, expected, detections, candidates, settings, tolerance)
        of_model.append(expected)
        of_runner.append(detections)
    if tolerance.ap is not None:
        detects = [_in_turn(of_model), _in_turn(of_runner)]
        precisions = average_precisions(detects, detector.names, data, imgsz, detector.spec.input.pad_value, count)
        if precisions is None and precision == "int8":
            raise UserError(NO_AP.format("--data"))
        report.model_ap, report.file_ap = precisions or (None, None)
    return report


def _in_turn(of_images: Sequence[Detections]) -> Detect:
    """Gives the detections of one image after the other, whatever it is asked about."""
    rest = iter(of_images)
    return lambda _: [next(rest)]


def refuse_difference(report: ParityReport, command: str) -> None:
    """GateError: the report has faults."""
    if faults := report.faults():
        raise GateError(f"`{command}` does not detect what the model detects: {'; '.join(faults)}")


def _run(command: str, images: Sequence[np.ndarray], names: Sequence[str]) -> list[list[Row]]:
    """What the command prints of images (h, w, 3) RGB, in their order, best first."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--runner {command}: {error}") from error
    if not words:
        raise UserError("--runner is empty; give a command that takes image files and prints JSON")
    with tempfile.TemporaryDirectory(prefix="yoloxkd-verify-") as folder:
        files = [str(Path(folder) / f"{i:04d}.png") for i in range(len(images))]
        for file, image in zip(files, images, strict=True):
            cv2.imwrite(file, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        try:
            done = subprocess.run([*words, *files], capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise UserError(f"--runner: {words[0]} cannot be started: {error.strerror or error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"--runner: `{command}` ended with exit status {done.returncode}: {last}")
    of_images = _rows(done.stdout, files, command)
    for rows in of_images:
        _check_labels(rows, names, command)
    return [sorted(rows, key=lambda row: -row.score) for rows in of_images]


def _rows(text: str, files: Sequence[str], command: str) -> list[list[Row]]:
    """The rows of each file."""
    try:
        images = TypeAdapter(list[RunnerImage]).validate_python(json.loads(text))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            fault = error.errors()[0]
            reason = f"{'.'.join(map(str, fault['loc'])) or 'all of it'}: {fault['msg']}"
        else:
            reason = f"it begins {text[:40]!r}"
        raise UserError(
            f"--runner: `{command}` should print JSON as export/predict.py does, "
            f"[{{image, detections: [{{box, score, label}}]}}] and nothing else; {reason}"
        ) from error
    if [Path(one.image).name for one in images] != [Path(file).name for file in files]:
        raise UserError(
            f"--runner: `{command}` printed {len(images)} images that are not the {len(files)} given, in order"
        )
    return [one.detections for one in images]


def _check_labels(rows: Sequence[Row], names: Sequence[str], command: str) -> None:
    """UserError: a row is of a class that the model does not have."""
    for row in rows:
        if row.label >= len(names) or row.name not in (None, names[row.label]):
            expected = f"label {row.label} {names[row.label]}" if row.label < len(names) else f"{len(names)} classes"
            raise UserError(
                f"--runner: `{command}` printed label {row.label}{'' if row.name is None else f' {row.name}'}, "
                f"and the model has {expected}; run a file of the same checkpoint"
            )


def _detections(rows: Sequence[Row], scale: float) -> Detections:
    """Boxes in px of the network input, whose px are `scale` of the image's."""
    boxes = np.array([row.box for row in rows], np.float32).reshape(-1, 4) * np.float32(scale)
    return Detections(boxes, np.array([r.score for r in rows], np.float32), np.array([r.label for r in rows], np.int64))


def _masks(rows: Sequence[Row], size: tuple[int, ...], command: str) -> np.ndarray:
    """(n, h, w) bool of an image of `size` (h, w) px; all False where a row has none. UserError: one is not of this image."""
    masks = np.zeros((len(rows), *size), bool)
    for mask, row in zip(masks, rows, strict=True):
        if row.mask is not None:
            try:
                if tuple(row.mask.size) != size:
                    raise ValueError(f"it is of {row.mask.size[0]}x{row.mask.size[1]} px")
                mask[:] = decode_rle(row.mask.counts, *size)
            except ValueError as error:
                raise UserError(
                    f"--runner: `{command}` printed a mask that is not one of the image's {size[0]}x{size[1]} px: {error}"
                ) from error
    return masks
