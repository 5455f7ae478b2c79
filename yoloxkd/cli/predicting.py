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

import cv2
import numpy as np

from yoloxkd.api import Detector
from yoloxkd.assembly.arguments import fraction
from yoloxkd.assembly.run import newest_run
from yoloxkd.cli.drawn_files import DIGESTS, VideoFile, read_digests, text_digest, write_image_file
from yoloxkd.cli.frame_progress import FrameProgress
from yoloxkd.cli.prediction_paths import Target, check_targets, free_targets, split_model
from yoloxkd.cli.results import Found, coco_results, yolo_text
from yoloxkd.cli.sources import Unreadable, find_sources, opened
from yoloxkd.cli.tables import printable, write_json
from yoloxkd.data.io.images import read_image
from yoloxkd.errors import Interrupted, UserError
from yoloxkd.types import Detections


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to leave, and where.

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
    arguments: Sequence[str], *, conf: float, iou: float, imgsz: int | None, device: str, wanted: Wanted
) -> None:
    """Detect on every source, write what is wanted, print a line a source.

    A source that cannot be read is named and left out. SomeUnreadable: there were such, and the rest is done;
    Interrupted: Ctrl-C or SIGTERM came, and what was found before is written; UserError: no source could be read.
    """
    model, given = split_model(arguments)
    sources = find_sources(given)
    fraction("--conf", conf), fraction("--iou", iou)
    model = model or str(newest_run())
    targets = free_targets(sources, wanted.out)
    check_targets(targets, given, model, wanted.out, wanted.text, wanted.json_file, wanted.coco_file)
    detector = Detector(model, device)
    detector.size(imgsz)

    def detect(pixels: np.ndarray) -> Detections:
        return detector.predict(pixels, conf=conf, iou=iou, imgsz=imgsz)[0]

    run = _Run(detect, wanted)
    try:
        (wanted.out / "labels" if wanted.text else wanted.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"could not write to {wanted.out}: {error.strerror or error}") from error
    with _ended_alike(), _digests_kept(run):
        run.all(targets)


@contextmanager
def _ended_alike() -> Iterator[None]:
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
def _digests_kept(run: _Run) -> Iterator[None]:
    """Around the writing of label files: what they were written as is known afterwards, however it ends but by a kill."""
    file = run.wanted.out / "labels" / DIGESTS
    before = read_digests(file.parent)
    try:
        if run.wanted.text:
            file.unlink(missing_ok=True)  # a killed run leaves files that it does not tell of
        yield
    finally:
        if run.texts:
            write_json(file, before | run.texts)


@dataclass(slots=True)
class _Run:
    """What has been found so far, the sources that could not be read, the digests of the label files written, and which
    of how many sources is being done."""

    detect: Callable[[np.ndarray], Detections]
    wanted: Wanted
    found: list[Found] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    place: str = ""

    def all(self, targets: Sequence[Target]) -> None:
        done = 0
        try:
            for number, target in enumerate(targets, start=1):
                self.place = f"{number}/{len(targets)} " if len(targets) > 1 else ""
                self._one(target, alone=len(targets) == 1)
                done += 1
        except KeyboardInterrupt:
            self._write()
            raise Interrupted(
                f"interrupted after {done} of {len(targets)} sources; what was found until then is written"
            ) from None
        except UserError:
            if not self.wanted.strict:
                self._write()
            raise
        listed = ", ".join(self.bad[:20]) + (", ..." if len(self.bad) > 20 else "")
        if self.bad and not self.found:
            raise UserError(f"none of the {len(targets)} sources could be read: {listed}")
        self._write()
        if self.bad:
            raise SomeUnreadable(
                f"{len(self.bad)} of {len(targets)} sources could not be read as a whole: {listed}; what was found in "
                "all others is written"
            )

    def _one(self, target: Target, alone: bool) -> None:
        before = len(self.found)
        try:
            self._picture(target) if target.source.kind == "image" else self._video(target)
        except Unreadable as error:
            if self.wanted.strict or (alone and len(self.found) == before):
                raise
            print(f"yoloxkd: {error}", file=sys.stderr, flush=True)
            self.bad.append(str(target.source.path))

    def _picture(self, target: Target) -> None:
        path = target.source.path
        try:
            pixels, _ = read_image(str(path))
        except UserError as error:
            raise Unreadable(str(error)) from error
        started = time.perf_counter()
        try:
            found = self.detect(pixels)
        except cv2.error as error:
            size = f"{pixels.shape[1]}x{pixels.shape[0]} px"
            raise Unreadable(f"{path}, an image of {size}, cannot be fitted to the input size") from error
        seconds = time.perf_counter() - started
        write_image_file(target.file, found.plot(pixels))
        self._keep(Found(str(path), None, (pixels.shape[0], pixels.shape[1]), found), target)
        print(f"{self.place}{path}: {_counted([found])} ({1000 * seconds:.0f} ms) -> {target.file}", flush=True)

    def _video(self, target: Target) -> None:
        """Every frame of a video or camera; a camera runs until `max_frames` or Ctrl-C."""
        seconds, first = 0.0, len(self.found)
        file: VideoFile | None = None
        progress: FrameProgress | None = None
        camera = target.source.kind == "camera"
        label = f"camera{target.source.path}" if camera else str(target.source.path)
        try:
            with opened(target.source, self.wanted.max_frames) as stream:
                progress = FrameProgress(f"{self.place}{label}", stream.count)
                for number, pixels in enumerate(stream.frames):
                    size = (pixels.shape[0], pixels.shape[1])
                    file = file or VideoFile(target.file, stream.fps, size)
                    started = time.perf_counter()
                    here = self.detect(pixels)
                    seconds += time.perf_counter() - started
                    file.write(here.plot(pixels))
                    self._keep(Found(label, number, size, here), target)
                    progress(number + 1)
        except KeyboardInterrupt:
            if not camera:
                raise
        finally:
            if progress is not None:
                progress.clear()
            if file is not None:
                file.close()
                here_found = self.found[first:]
                each = 1000 * seconds / max(len(here_found), 1)
                listed = _counted([one.detections for one in here_found])
                print(
                    f"{self.place}{label}: {len(here_found)} frames, {listed} ({each:.0f} ms a frame) -> {target.file}",
                    flush=True,
                )

    def _keep(self, one: Found, target: Target) -> None:
        self.found.append(one)
        if self.wanted.text:
            text = target.text(one.frame)
            try:
                lines = yolo_text(one, self.wanted.scores)
                text.write_text(lines, encoding="utf-8")
                self.texts[text.name] = text_digest(lines)
            except OSError as error:
                raise UserError(f"could not write {text}: {error.strerror or error}") from error

    def _write(self) -> None:
        if self.wanted.json_file is not None:
            write_json(self.wanted.json_file, [one.row() for one in self.found])
        if self.wanted.coco_file is not None:
            write_json(self.wanted.coco_file, coco_results(self.found))


def _counted(found: Sequence[Detections]) -> str:
    labels = np.concatenate([one.labels for one in found]) if found else np.zeros(0, np.int64)
    names = found[0].names if found else []
    counts = {name: int((labels == i).sum()) for i, name in enumerate(names)}
    return ", ".join(f"{c} {printable(n)}" for n, c in counts.items() if c) or "nothing"
