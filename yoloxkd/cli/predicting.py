"""`yoloxkd predict`: detect on images, videos and cameras, draw, write."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from yoloxkd.api import Detector
from yoloxkd.assembly.arguments import fraction
from yoloxkd.assembly.run import newest_run
from yoloxkd.cli.drawn_files import DIGESTS, VideoFile, read_digests, text_digest, write_image_file
from yoloxkd.cli.frame_progress import FrameProgress
from yoloxkd.cli.prediction_paths import Target, check_targets, free_targets, split_model
from yoloxkd.cli.results import ImageResult, coco_rows, numbered, yolo_text
from yoloxkd.cli.sources import Unreadable, find_sources, opened
from yoloxkd.cli.tables import printable, write_json
from yoloxkd.data.io.images import read_image
from yoloxkd.errors import Interrupted, UserError
from yoloxkd.types import Detections


@dataclass(frozen=True, slots=True)
class PredictionOutputs:
    """The files that predict writes, and what ends it.

    out        folder of the drawn images and videos, and of `labels/`
    json_file  rows of detections an image
    coco_file  COCO's result format
    text       YOLO text in `out/labels/`, a file an image or frame
    scores     the score as sixth column of that text
    strict     end at the first source that cannot be read, and write no results
    max_frames frames of a video or camera; None: all
    """

    out: Path
    json_file: Path | None = None
    coco_file: Path | None = None
    text: bool = False
    scores: bool = False
    strict: bool = False
    max_frames: int | None = None


class SomeUnreadable(UserError):
    """Some sources could not be read; the results of the others are written. The command line exits 1."""

    exit_code = 1


def predict_files(
    arguments: Sequence[str], *, conf: float, iou: float, imgsz: int | None, device: str, outputs: PredictionOutputs
) -> None:
    """Detect on every source, write the outputs, print a line a source.

    A source that cannot be read is named and left out. SomeUnreadable: there were such, and the rest is done;
    Interrupted: Ctrl-C or SIGTERM came, and the results so far are written; UserError: no source could be read.
    """
    model, source_arguments = split_model(arguments)
    sources = find_sources(source_arguments)
    fraction("--conf", conf), fraction("--iou", iou)
    model = model or str(newest_run())
    targets = free_targets(sources, outputs.out)
    check_targets(targets, source_arguments, model, outputs.out, outputs.text, outputs.json_file, outputs.coco_file)
    detector = Detector(model, device)
    detector.size(imgsz)

    def detect(pixels: np.ndarray) -> Detections:
        return detector.predict(pixels, conf=conf, iou=iou, imgsz=imgsz)[0]

    run = _Run(detect, outputs)
    try:
        (outputs.out / "labels" if outputs.text else outputs.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"could not write to {outputs.out}: {error.strerror or error}") from error
    with _sigterm_as_interrupt(), _keep_digests(run):
        run.all(targets)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Within: SIGTERM does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _keep_digests(run: _Run) -> Iterator[None]:
    """Around the writing of label files: record their digests in the end, unless the process is killed."""
    file = run.outputs.out / "labels" / DIGESTS
    before = read_digests(file.parent)
    try:
        if run.outputs.text:
            file.unlink(missing_ok=True)  # a killed run leaves files that it does not tell of
        yield
    finally:
        if run.digests:
            write_json(file, before | run.digests)


@dataclass(frozen=True, slots=True)
class _Found:
    """What is kept of an image's or frame's result: no pixels and no masks of its size.

    labels  (n,); row and coco_rows as the files have them that were asked for
    """

    stem: str
    labels: np.ndarray
    names: Sequence[str]
    row: dict[str, Any] | None
    coco_rows: list[dict[str, Any]]


@dataclass(slots=True)
class _Run:
    """The results so far, the sources that could not be read, the digests of the label files written by name, and
    which of how many sources is next, as lines begin with it."""

    detect: Callable[[np.ndarray], Detections]
    outputs: PredictionOutputs
    results: list[_Found] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    prefix: str = ""

    def all(self, targets: Sequence[Target]) -> None:
        done = 0
        try:
            for number, target in enumerate(targets, start=1):
                self.prefix = f"{number}/{len(targets)} " if len(targets) > 1 else ""
                self._predict_source(target, alone=len(targets) == 1)
                done += 1
        except KeyboardInterrupt:
            self._write()
            raise Interrupted(
                f"interrupted after {done} of {len(targets)} sources; what was found until then is written"
            ) from None
        except UserError:
            if not self.outputs.strict:
                self._write()
            raise
        sources = ", ".join(self.unreadable[:20]) + (", ..." if len(self.unreadable) > 20 else "")
        if self.unreadable and not self.results:
            raise UserError(f"none of the {len(targets)} sources could be read: {sources}")
        self._write()
        if self.unreadable:
            raise SomeUnreadable(
                f"{len(self.unreadable)} of {len(targets)} sources could not be read as a whole: {sources}; what was "
                "found in all others is written"
            )

    def _predict_source(self, target: Target, alone: bool) -> None:
        before = len(self.results)
        try:
            self._predict_image(target) if target.source.kind == "image" else self._predict_video(target)
        except Unreadable as error:
            if self.outputs.strict or (alone and len(self.results) == before):
                raise
            print(f"yoloxkd: {error}", file=sys.stderr, flush=True)
            self.unreadable.append(str(target.source.path))

    def _predict_image(self, target: Target) -> None:
        path = target.source.path
        try:
            pixels, _ = read_image(str(path))
        except UserError as error:
            raise Unreadable(str(error)) from error
        started = time.perf_counter()
        try:
            detections = self.detect(pixels)
        except cv2.error as error:
            size = f"{pixels.shape[1]}x{pixels.shape[0]} px"
            raise Unreadable(f"{path}, an image of {size}, cannot be fitted to the input size") from error
        seconds = time.perf_counter() - started
        write_image_file(target.file, detections.plot(pixels))
        self._add(ImageResult(str(path), None, (pixels.shape[0], pixels.shape[1]), detections), target)
        print(
            f"{self.prefix}{path}: {_count_text(self.results[-1:])} ({1000 * seconds:.0f} ms) -> {target.file}",
            flush=True,
        )

    def _predict_video(self, target: Target) -> None:
        """Every frame of a video or camera; a camera runs until `max_frames` or Ctrl-C."""
        seconds, first = 0.0, len(self.results)
        file: VideoFile | None = None
        progress: FrameProgress | None = None
        camera = target.source.kind == "camera"
        label = f"camera{target.source.path}" if camera else str(target.source.path)
        try:
            with opened(target.source, self.outputs.max_frames) as stream:
                progress = FrameProgress(f"{self.prefix}{label}", stream.count)
                for number, pixels in enumerate(stream.frames):
                    size = (pixels.shape[0], pixels.shape[1])
                    file = file or VideoFile(target.file, stream.fps, size)
                    started = time.perf_counter()
                    detections = self.detect(pixels)
                    seconds += time.perf_counter() - started
                    file.write(detections.plot(pixels))
                    self._add(ImageResult(label, number, size, detections), target)
                    progress(number + 1)
        except KeyboardInterrupt:
            if not camera:
                raise
        finally:
            if progress is not None:
                progress.clear()
            if file is not None:
                file.close()
                frames = self.results[first:]
                each = 1000 * seconds / max(len(frames), 1)
                counts = _count_text(frames)
                print(
                    f"{self.prefix}{label}: {len(frames)} frames, {counts} ({each:.0f} ms a frame) -> {target.file}",
                    flush=True,
                )

    def _add(self, result: ImageResult, target: Target) -> None:
        detections = result.detections
        row = None if self.outputs.json_file is None else result.row()
        rows = [] if self.outputs.coco_file is None else coco_rows(result)
        self.results.append(_Found(result.stem, detections.labels, detections.names, row, rows))
        if self.outputs.text:
            text = target.text(result.frame)
            try:
                lines = yolo_text(result, self.outputs.scores)
                text.write_text(lines, encoding="utf-8")
                self.digests[text.name] = text_digest(lines)
            except OSError as error:
                raise UserError(f"could not write {text}: {error.strerror or error}") from error

    def _write(self) -> None:
        if self.outputs.json_file is not None:
            write_json(self.outputs.json_file, [one.row for one in self.results])
        if self.outputs.coco_file is not None:
            rows = numbered([one.stem for one in self.results], [one.coco_rows for one in self.results])
            write_json(self.outputs.coco_file, rows)


def _count_text(found: Sequence[_Found]) -> str:
    labels = np.concatenate([one.labels for one in found]) if found else np.zeros(0, np.int64)
    names = found[0].names if found else []
    counts = {name: int((labels == i).sum()) for i, name in enumerate(names)}
    return ", ".join(f"{c} {printable(n)}" for n, c in counts.items() if c) or "nothing"
