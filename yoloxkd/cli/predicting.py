"""`yoloxkd predict`: detect on pictures, videos and cameras, draw, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from yoloxkd.api import Detector
from yoloxkd.build.models import model_names
from yoloxkd.cli.results import Found, VideoFile, coco_results, yolo_text
from yoloxkd.cli.sources import Source, find_sources, opened
from yoloxkd.cli.tables import write_json
from yoloxkd.data.images import read_image
from yoloxkd.errors import UserError
from yoloxkd.types import Detections
from yoloxkd.viz.draw import draw_detections

MODEL_SUFFIXES = (".pt", ".pth", ".onnx")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to leave, and where.

    out        folder of the drawn pictures and videos, and of `labels/`
    json_file  rows of detections a picture
    coco_file  COCO's result format
    text       YOLO text in `out/labels/`, a file a picture or frame
    """

    out: Path
    json_file: Path | None = None
    coco_file: Path | None = None
    text: bool = False


def predict_files(
    arguments: Sequence[str],
    *,
    conf: float,
    iou: float,
    imgsz: int | None,
    device: str,
    wanted: Wanted,
    max_frames: int | None = None,
) -> None:
    """Detect on every source, write what is wanted, print a line a source. Ctrl-C ends a video, not what was found."""
    model, given = split_model(arguments)
    sources = find_sources(given)
    detector = Detector(model, device)
    names = _free_names(sources)
    labels = wanted.out / "labels"
    try:
        (labels if wanted.text else wanted.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {wanted.out}: {error.strerror or error}") from error

    def detect(pixels: np.ndarray) -> Detections:
        return detector.predict(pixels, conf=conf, iou=iou, imgsz=imgsz)[0]

    found: list[Found] = []
    for source, name in zip(sources, names, strict=True):
        target = wanted.out / name
        here = (
            _picture(source, target, detect) if source.kind == "image" else _video(source, target, detect, max_frames)
        )
        found += here
        if wanted.text:
            for one in here:
                frame = "" if one.frame is None else f"_{one.frame:06d}"
                (labels / f"{target.stem}{frame}.txt").write_text(yolo_text(one), encoding="utf-8")
    if wanted.json_file is not None:
        write_json(wanted.json_file, [one.row() for one in found])
    if wanted.coco_file is not None:
        write_json(wanted.coco_file, coco_results(found))


def _picture(source: Source, target: Path, detect: Callable[[np.ndarray], Detections]) -> list[Found]:
    pixels, _ = read_image(str(source.path))
    started = time.perf_counter()
    found = detect(pixels)
    seconds = time.perf_counter() - started
    drawn = draw_detections(pixels, found)
    if not cv2.imwrite(str(target), cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)):
        raise UserError(f"cannot write {target}; is the folder writable?")
    print(f"{source.path}: {_counted([found])} ({1000 * seconds:.0f} ms) -> {target}")
    return [Found(str(source.path), None, (pixels.shape[0], pixels.shape[1]), found)]


def _video(
    source: Source, target: Path, detect: Callable[[np.ndarray], Detections], max_frames: int | None
) -> list[Found]:
    """Every frame of a video or camera; a camera runs until `max_frames` or Ctrl-C."""
    found: list[Found] = []
    seconds = 0.0
    file: VideoFile | None = None
    label = f"camera{source.path}" if source.kind == "camera" else str(source.path)
    try:
        with opened(source, max_frames) as stream:
            for number, pixels in enumerate(stream.frames):
                size = (pixels.shape[0], pixels.shape[1])
                file = file or VideoFile(target, stream.fps, size)
                started = time.perf_counter()
                here = detect(pixels)
                seconds += time.perf_counter() - started
                found.append(Found(label, number, size, here))
                file.write(draw_detections(pixels, here))
    except KeyboardInterrupt:
        print(f"{label}: stopped after {len(found)} frames")
    finally:
        if file is not None:
            file.close()
    listed = _counted([one.detections for one in found])
    each = 1000 * seconds / max(len(found), 1)
    print(f"{label}: {len(found)} frames, {listed} ({each:.0f} ms a frame) -> {target}")
    return found


def _counted(found: Sequence[Detections]) -> str:
    labels = np.concatenate([one.labels for one in found]) if found else np.zeros(0, np.int64)
    names = found[0].names if found else []
    counts = {name: int((labels == i).sum()) for i, name in enumerate(names)}
    return ", ".join(f"{c} {n}" for n, c in counts.items() if c) or "nothing"


def split_model(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """[MODEL] SOURCE...: the first argument is the model when it looks like one, else the newest run is meant."""
    first, *rest = arguments
    is_model = first.endswith(MODEL_SUFFIXES) or first.partition("@")[0] in model_names()
    if is_model and not rest:
        raise UserError(
            f"nothing to predict on: give images, folders, globs, videos or a camera's number after {first}"
        )
    return (first, rest) if is_model else (None, list(arguments))


def _free_names(sources: Sequence[Source]) -> list[str]:
    """Names to write to: each file's own, numbered where two share a stem, never a format that cannot be written."""
    used: set[str] = set()
    out = []
    for source in sources:
        suffix = source.path.suffix.lower() if source.path.suffix.lower() in (".jpg", ".jpeg", ".png") else ".png"
        stem = f"camera{source.path}" if source.kind == "camera" else source.path.stem
        name, number = stem, 1
        while name in used:
            number += 1
            name = f"{stem}-{number}"
        used.add(name)
        out.append(name + (suffix if source.kind == "image" else ".mp4"))
    return out
