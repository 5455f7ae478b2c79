"""Description of an exported file whose format has no place for metadata, as JSON."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from yoloxkd.errors import UserError
from yoloxkd.exporters.onnx import RAW_OUTPUTS, ExportOptions, metadata
from yoloxkd.exporters.raw_graph import describe_head
from yoloxkd.file_kinds import ARCHIVED_NOTE
from yoloxkd.nn.detector import Detector


class FileDescription(BaseModel):
    """Names of the outputs, in the file's order, and the metadata that an ONNX file has inside, as texts."""

    outputs: list[str]
    metadata: dict[str, str]


def describe_file(detector: Detector[Any, Any], options: ExportOptions, source_digest: str) -> str:
    """The JSON of a file without NMS."""
    outputs = describe_head(detector).tensors() if options.raw else list(RAW_OUTPUTS)
    texts = metadata(detector, options, source_digest)
    return json.dumps({"outputs": outputs, "metadata": texts}, indent=2)


def append_description(detector: Detector[Any, Any], options: ExportOptions, source_digest: str, path: Path) -> None:
    """Put the JSON behind a file whose readers ignore what follows, as a zip archive: TFLite's own way, which ExecuTorch takes too."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(ARCHIVED_NOTE, describe_file(detector, options, source_digest))


def archived_description(path: Path) -> FileDescription:
    """What `append_description` wrote. UserError: it is not there."""
    try:
        with zipfile.ZipFile(path) as archive:
            return read_description(archive.read(ARCHIVED_NOTE), path)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path} lacks the metadata of a file that `yoloxkd export` wrote") from error


def read_description(text: str | bytes, path: Path) -> FileDescription:
    """What `describe_file` wrote for the file `path`. UserError: it is something else."""
    try:
        return FileDescription.model_validate_json(text)
    except (ValidationError, ValueError) as error:
        raise UserError(f"{path} has metadata that cannot be read; export the checkpoint again") from error


def check_plain(detector: Detector[Any, Any], options: ExportOptions, kind: str) -> None:
    """UserError: the numbers make no file, or a format without NMS and free shapes cannot hold it. Before any conversion."""
    if options.dynamic:
        raise UserError(f"a file of format {kind} has one size, and one image at a time; leave --dynamic out")
    if not detector.spec.stable_locations or detector.spec.masks:
        raise UserError(
            f"a {detector.family} has NMS inside, which format {kind} has not; export it as onnx, or choose another family"
        )
    options.check(detector)
