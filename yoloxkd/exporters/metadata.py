"""Metadata of an exported file, validated when the file is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from yoloxkd.config.load import shown
from yoloxkd.errors import UserError

Side = Annotated[int, Field(ge=1, le=16_384)]
Level = Annotated[int, Field(ge=0, le=255)]


class FileMetadata(BaseModel):
    """What a predictor needs to know of a file; each is JSON in the file's metadata.

    names          class names, in label order
    size_multiple  px, sides of the input must be multiples of it
    input_size     [height, width] the file was exported for, px
    pad_value      RGB of letterbox padding
    dynamic        any batch and any size
    nms            suppression is in the graph, with these conf, iou and max_det
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    names: list[str] = Field(min_length=1)
    size_multiple: Side
    input_size: list[Side] = Field(min_length=2, max_length=2)
    pad_value: list[Level] = Field(min_length=3, max_length=3)
    dynamic: bool
    nms: bool
    conf: float = Field(ge=0, le=1)
    iou: float = Field(gt=0, le=1)
    max_det: int = Field(ge=1, le=1_000_000)

    @field_validator("names")
    @classmethod
    def _different(cls, value: list[str]) -> list[str]:
        if not all(value) or len(set(value)) < len(value):
            raise ValueError("should be class names, none empty and none twice")
        return value


def read_metadata(texts: Mapping[str, str], path: Path) -> FileMetadata:
    """The metadata of a file of ours. UserError: keys are missing, or hold what they should not."""
    missing = [key for key in FileMetadata.model_fields if key not in texts]
    if missing:
        raise UserError(
            f"{path} lacks the metadata {', '.join(missing)}: it was not written by `yoloxkd export`; "
            "export the checkpoint with this package"
        )
    found: dict[str, Any] = {}
    for key in FileMetadata.model_fields:
        try:
            found[key] = json.loads(texts[key])
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} has metadata that cannot be read ('{key}' is {shown(texts[key])}); export the checkpoint again"
            ) from error
    try:
        return FileMetadata.model_validate(found)
    except ValidationError as error:
        fault = error.errors()[0]
        reason = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise UserError(
            f"{path} has metadata that cannot be right: {'.'.join(map(str, fault['loc']))} {reason[0].lower() + reason[1:]}, "
            f"and is {shown(fault['input'])}; export the checkpoint again"
        ) from error
