"""Metadata of an exported file, validated when the file is opened."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from yoloxkd.config.load import shown
from yoloxkd.errors import UserError
from yoloxkd.exporters.head_maps import HeadMaps, Side

Level = Annotated[int, Field(ge=0, le=255)]


class FileMetadata(BaseModel):
    """What a predictor needs to know of a file; each is JSON in the file's metadata.

    names          class names, in label order
    size_multiple  px, sides of the input must be multiples of it
    input_size     [height, width] the file was exported for, px
    pad_value      RGB of letterbox padding
    dynamic        any batch and any size
    nms            suppression is in the graph, with these conf, iou and max_det
    masks          the file gives masks; not in files of older versions
    head_maps      the outputs are the head's own tensors, described here
    pairs_per_level       what goes into NMS. None, as in files without this key: the best class of each location; a
                          number: every class, and so many of the best (location, class) pairs of each level
    strides, predictions_per_cell   a level of stride s has ceil(H / s) ceil(W / s) cells of so many locations each; 0:
                          the locations lie in no cells and are one level
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
    pairs_per_level: int | None = Field(None, ge=1, le=1_000_000)
    strides: list[Side] = []
    predictions_per_cell: int = Field(1, ge=0, le=1_000)
    masks: bool = False
    head_maps: HeadMaps | None = None

    @field_validator("names")
    @classmethod
    def _different(cls, value: list[str]) -> list[str]:
        if not all(value) or len(set(value)) < len(value):
            raise ValueError("should be class names, none empty and none twice")
        return value

    def level_sizes(self, height: int, width: int, locations: int, path: Path) -> tuple[int, ...]:
        """How many of the locations each level has in an input of height x width px, in their order.

        UserError: they do not add up to the `locations` of the file's outputs.
        """
        if not self.predictions_per_cell:
            return (locations,)
        cells = (math.ceil(height / stride) * math.ceil(width / stride) for stride in self.strides)
        sizes = tuple(self.predictions_per_cell * number for number in cells)
        if sum(sizes) != locations:
            raise UserError(
                f"{path}: its metadata (strides {self.strides}, {self.predictions_per_cell} predictions a cell) promises "
                f"{sum(sizes)} locations at {height}x{width}, and its outputs have {locations}; export the checkpoint again"
            )
        return sizes


def read_metadata(texts: Mapping[str, str], path: Path) -> FileMetadata:
    """The metadata of a file of ours; files of older versions lack some keys. UserError: keys are missing, or hold what they should not."""
    fields = FileMetadata.model_fields
    missing = [key for key, field in fields.items() if field.is_required() and key not in texts]
    if missing:
        raise UserError(
            f"{path} lacks the metadata {', '.join(missing)}: it was not written by `yoloxkd export`; "
            "export the checkpoint with this package"
        )
    values: dict[str, Any] = {}
    for key in fields.keys() & texts.keys():
        try:
            values[key] = json.loads(texts[key])
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} has metadata that cannot be read ('{key}' is {shown(texts[key])}); export the checkpoint again"
            ) from error
    try:
        return FileMetadata.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        reason = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise UserError(
            f"{path} has metadata that cannot be right: {'.'.join(map(str, fault['loc']))} {reason[0].lower() + reason[1:]}, "
            f"and is {shown(fault['input'])}; export the checkpoint again"
        ) from error
