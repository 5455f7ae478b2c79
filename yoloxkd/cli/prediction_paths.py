"""Output paths of `yoloxkd predict`, decided for all sources before the first is read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from yoloxkd.assembly.models import model_names
from yoloxkd.cli.drawn_files import is_drawn, is_drawn_text, read_digests
from yoloxkd.cli.sources import VIDEO_SUFFIXES, Source
from yoloxkd.data.io.images import IMAGE_SUFFIXES
from yoloxkd.errors import UserError, nearest
from yoloxkd.file_kinds import EXPORTED, exported_format, is_torch
from yoloxkd.output_paths import Output, check_folder, check_outputs, folded

MODEL_SUFFIXES = (".pt", ".pth", *EXPORTED.values())
_FRAME = re.compile(r"(.+)_\d{6,}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Target:
    """A source, and the file it is drawn to."""

    source: Source
    file: Path

    def text(self, frame: int | None) -> Path:
        """The file of YOLO text of an image, or of a frame."""
        number = "" if frame is None else f"_{frame:06d}"
        return self.file.parent / "labels" / f"{self.file.stem}{number}.txt"


def split_model(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """[MODEL] SOURCE...: the first argument is the model when it is one, else the newest run is meant."""
    first, *rest = arguments
    is_model = _is_model(first)
    if is_model and not rest:
        raise UserError(
            f"nothing to predict on: give images, folders, globs, videos or a camera's number after {first}"
        )
    if rest and not is_model and not os.path.exists(first) and get_close_matches(first, model_names(), n=1, cutoff=0.8):
        raise UserError(f"'{first}' is neither a model nor a file or folder; {nearest(first, model_names())}")
    return (first, rest) if is_model else (None, list(arguments))


def _is_model(argument: str) -> bool:
    lower = argument.lower()
    if lower.endswith(MODEL_SUFFIXES) or argument.partition("@")[0] in model_names():
        return True
    return not lower.endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES) and (
        exported_format(argument) is not None or is_torch(argument)
    )


def free_targets(sources: Sequence[Source], out: Path) -> list[Target]:
    """A file for each source: its own name, numbered where two share a stem or a video's frames would have it.

    Case does not count, because some file systems do not see it. A format that cannot be written becomes PNG.
    """
    clips = {_stem(source).casefold() for source in sources if source.kind != "image"}
    taken_names: set[str] = set()
    targets = []
    for source in sources:
        stem = _stem(source)
        name, number = stem, 1
        while name.casefold() in taken_names or (source.kind == "image" and _is_frame(name.casefold(), clips)):
            number += 1
            name = f"{stem}-{number}"
        taken_names.add(name.casefold())
        suffix = source.path.suffix.lower() if source.path.suffix.lower() in (".jpg", ".jpeg", ".png") else ".png"
        targets.append(Target(source, out / (name + (suffix if source.kind == "image" else ".mp4"))))
    return targets


def _stem(source: Source) -> str:
    return f"camera{source.path}" if source.kind == "camera" else source.path.stem


def _is_frame(name: str, clips: set[str]) -> bool:
    match = _FRAME.fullmatch(name)
    return match is not None and match[1] in clips


def check_targets(
    targets: Sequence[Target],
    arguments: Sequence[str],
    model: str,
    out: Path,
    text: bool,
    json_file: Path | None,
    coco_file: Path | None,
) -> None:
    """UserError: a file to be written is a source, the model, another one of them, or of the user's own making."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, not a folder; give another --out")
    for source in arguments:
        if Path(source).is_dir() and folded(source) == folded(out):
            raise UserError(
                f"--out {out} is the folder of the images to predict on, which would be replaced; give another --out"
            )
    outputs = [Output("--out", target.file, is_drawn) for target in targets]
    if text:
        is_replaceable = partial(is_drawn_text, digests=read_digests(out / "labels"))
        outputs += [
            Output("--save-txt", file, is_replaceable, blank=True) for target in targets for file in _texts(target)
        ]
    for option, file in (("--json", json_file), ("--coco", coco_file)):
        outputs += [] if file is None else [Output(option, file)]
    sources = [target.source.path for target in targets if target.source.kind != "camera"]
    check_outputs(outputs, [model, *sources])
    check_folder(out)


def _texts(target: Target) -> list[Path]:
    """The text of an image; of a video, which has as many as frames, those that are there already."""
    if target.source.kind == "image":
        return [target.text(None)]
    folder, stem = target.file.parent / "labels", target.file.stem
    files = folder.iterdir() if folder.is_dir() else ()
    return [file for file in files if file.suffix == ".txt" and (m := _FRAME.fullmatch(file.stem)) and m[1] == stem]
