"""`yoloxkd predict`: find the pictures, detect, draw, write."""

from __future__ import annotations

import glob
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2

from yoloxkd.api import Detector
from yoloxkd.build.models import model_names
from yoloxkd.cli.tables import write_json
from yoloxkd.data.images import IMAGE_SUFFIXES, read_image
from yoloxkd.errors import UserError
from yoloxkd.viz.draw import draw_detections

MODEL_SUFFIXES = (".pt", ".pth", ".onnx")


def predict_files(
    arguments: Sequence[str],
    *,
    conf: float,
    iou: float,
    imgsz: int | None,
    device: str,
    out: Path,
    json_file: Path | None,
) -> None:
    """Detect on every source, write drawn pictures to `out`, print a line an image, and JSON when asked."""
    model, sources = split_model(arguments)
    files = list(find_images(sources))
    detector = Detector(model, device)
    names = _free_names(files)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    rows: list[dict[str, Any]] = []
    for file, name in zip(files, names, strict=True):
        pixels, _ = read_image(str(file))
        started = time.perf_counter()
        found = detector.predict(pixels, conf=conf, iou=iou, imgsz=imgsz)[0]
        seconds = time.perf_counter() - started
        drawn = draw_detections(pixels, found)
        if not cv2.imwrite(str(out / name), cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)):
            raise UserError(f"cannot write {out / name}; is the folder writable?")
        counts = {n: int((found.labels == i).sum()) for i, n in enumerate(found.names)}
        listed = ", ".join(f"{c} {n}" for n, c in counts.items() if c) or "nothing"
        print(f"{file}: {listed} ({1000 * seconds:.0f} ms) -> {out / name}")
        rows.append({"image": str(file), "detections": found.as_dicts()})
    if json_file is not None:
        write_json(json_file, rows)


def split_model(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """[MODEL] SOURCE...: the first argument is the model when it looks like one, else the newest run is meant."""
    first, *rest = arguments
    is_model = first.endswith(MODEL_SUFFIXES) or first.partition("@")[0] in model_names()
    if is_model and not rest:
        raise UserError(f"nothing to predict on: give images, folders or globs after {first}")
    return (first, rest) if is_model else (None, list(arguments))


def find_images(sources: Iterable[str]) -> Iterable[Path]:
    """Files as they are, folders by their images, globs by what they match; a source without images is a UserError."""
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(source, recursive=True))
        if not found:
            raise UserError(f"no image at {source}: no such file, an empty folder, or a pattern that matches nothing")
        yield from found


def _free_names(files: Sequence[Path]) -> list[str]:
    """Names to write to: each file's own, numbered where two folders hold the same name, never a format that cannot."""
    used: set[str] = set()
    out = []
    for file in files:
        suffix = file.suffix.lower() if file.suffix.lower() in (".jpg", ".jpeg", ".png") else ".png"
        name, number = file.stem + suffix, 1
        while name in used:
            number += 1
            name = f"{file.stem}-{number}{suffix}"
        used.add(name)
        out.append(name)
    return out
