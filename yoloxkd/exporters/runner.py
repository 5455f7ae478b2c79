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
from yoloxkd.exporters.matching import Candidates, Suppression, compare
from yoloxkd.exporters.parity import AP_IMAGES, IMAGES, Reference, suppressed
from yoloxkd.exporters.parity_report import TOLERANCES, ParityReport
from yoloxkd.nn.detector import Detector
from yoloxkd.types import Detections


class Row(BaseModel):
    """One detection as a runner prints it: box xyxy px of the image, score, label."""

    model_config = ConfigDict(allow_inf_nan=False)

    box: Annotated[list[float], Field(min_length=4, max_length=4)]
    score: float = Field(ge=0, le=1)
    label: int = Field(ge=0)
    name: str | None = None


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

    command    words as in a shell; it prints what `export/predict.py` prints: [{image, detections: [{box, score, label}]}]
    imgsz      px, of the model's input; the runner's should be the same, with the same letterbox
    precision  fp32, fp16 or int8: whose tolerance holds
    settings   what the runner's NMS is set to

    The images are PNG files, so that both sides see the same pixels. GateError: they differ; UserError: the command
    fails, or prints something else.
    """
    tolerance = TOLERANCES[precision]
    count = IMAGES if tolerance.ap is None else AP_IMAGES
    indices = np.unique(np.linspace(0, max(len(data) - 1, 0), min(count, len(data))).round().astype(int)).tolist()
    images = [data.read(i) for i in indices]
    printed = _run(command, images, detector.names)
    model, report = Reference(detector), ParityReport(tolerance, images=len(images))
    of_model: list[Detections] = []
    of_runner: list[Detections] = []
    for image, rows in zip(images, printed, strict=True):
        pixels, scale, _, _ = letterbox(image, (imgsz, imgsz), detector.spec.input.pad_value)
        boxes, scores, levels = model(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]))
        expected = suppressed(boxes, scores, levels, settings)[0]
        detections = Detections(rows.boxes * np.float32(scale), rows.scores, rows.labels)
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


def _run(command: str, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Detections]:
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
    return [_detections(rows, names, command) for rows in _rows(done.stdout, files, command)]


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


def _detections(rows: Sequence[Row], names: Sequence[str], command: str) -> Detections:
    for row in rows:
        if row.label >= len(names) or row.name not in (None, names[row.label]):
            expected = f"label {row.label} {names[row.label]}" if row.label < len(names) else f"{len(names)} classes"
            raise UserError(
                f"--runner: `{command}` printed label {row.label}{'' if row.name is None else f' {row.name}'}, "
                f"and the model has {expected}; run a file of the same checkpoint"
            )
    rows = sorted(rows, key=lambda row: -row.score)
    boxes = np.array([row.box for row in rows], np.float32).reshape(-1, 4)
    return Detections(boxes, np.array([r.score for r in rows], np.float32), np.array([r.label for r in rows], np.int64))
