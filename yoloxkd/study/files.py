"""Files of runs as typed values, validated once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from yoloxkd.config.load import shown
from yoloxkd.config.recipe import MOST_EPOCHS
from yoloxkd.engine.callbacks import csv_log
from yoloxkd.errors import UserError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

Seconds = Annotated[float, Field(ge=0)]
Measure = Annotated[float, Field(ge=-1, le=1)]


class RunPart(BaseModel):
    """JSON of the types that were written; keys that only people look up may be there as well."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class Measured(RunPart):
    """test.json and metrics.json: numbers from 0 to 1, -1 where nothing could be measured or a number is not there.

    errors  as `metrics.coco.error_types`; empty where they were not measured
    """

    AP: Measure = -1.0
    AP50: Measure = -1.0
    AP75: Measure = -1.0
    APs: Measure = -1.0
    APm: Measure = -1.0
    APl: Measure = -1.0
    errors: dict[str, dict[str, float | int]] = {}

    def overall(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in METRICS}


class ReportedFile(Measured):
    """test.json of a run: on which split it was measured; digests of that split and of the weights, where a study noted them."""

    split: str | None = None
    split_digest: str | None = None
    weights_digest: str | None = None


class ChosenFile(Measured):
    """metrics.json of a run: its best epoch, 1 is the first."""

    epoch: int = Field(ge=0, le=MOST_EPOCHS)
    split: str


class RunFile(RunPart):
    """run.json of a kept run.

    split             the one that was reported
    weights           digest of its weights, as `origins.weights_digest`
    data_digests      split -> digest, as `data.fingerprint`
    start_digest      of the weights that it started from
    teacher_digests   of the teachers' files; of an untrained teacher its own
    teacher_weights   of the teachers' weights, None where one is not known; of an untrained teacher those of the teacher whose
                      architecture it has. None: of a version that did not keep them
    teacher_settings  settings of a teacher that the study trained; empty: it came as a file
    teacher_start     as start_digest, of that teacher
    """

    student: str
    method: str
    seed: int
    epochs: int = Field(ge=0, le=MOST_EPOCHS)
    metrics: Measured
    seconds: Seconds = 0.0
    cpu_seconds: Seconds | None = None
    step_seconds: Seconds | None = None
    chosen: dict[str, float | str] | None = None
    settings: dict[str, Any] = {}
    split: str | None = None
    weights: str | None = None
    data_digests: dict[str, str] = {}
    start_digest: str | None = None
    teacher_digests: list[str] = []
    teacher_weights: list[str | None] | None = None
    teacher_settings: dict[str, Any] = {}
    teacher_start: str | None = None


class CostFile(RunPart):
    """cost.json: seconds of a training over all its parts."""

    wall: Seconds = 0.0
    cpu: Seconds = 0.0
    parts: int = Field(0, ge=0)


class Git(RunPart):
    commit: str | None = None


class Taught(RunPart):
    digest: str


class Teachers(RunPart):
    teachers: list[Taught] = []


class EnvironmentFile(RunPart):
    """environment.json, as far as a study reads it."""

    git: Git | None = None
    kd: Teachers = Teachers()
    torch: str | None = None
    processor: str | None = None
    device: str | None = None
    threads: int | None = None


File = TypeVar("File", bound=RunPart)


def read_file(kind: type[File], path: Path) -> File:
    """A checked file. UserError: it cannot be read, is no JSON, or holds what it should not."""
    try:
        return kind.model_validate(_json(path))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"] if not (isinstance(part, str) and "[" in part))
        if fault["type"] == "missing":
            raise UserError(f"{path} lacks '{key}'; it was changed or is of another program") from error
        reason = fault["msg"].removeprefix("Input ")
        raise UserError(
            f"{path} was changed or is damaged: '{key}' {reason}, and is {shown(fault['input'])}; remove it to have it made again"
        ) from error


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file. UserError: it cannot be read as one."""
    try:
        return [row for _, row in csv_log.read_table(path)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def speeds(path: Path) -> list[float]:
    """Images a second in each epoch, from results.csv. UserError: a row lacks it."""
    values = []
    for number, row in enumerate(read_table(path), 2):
        try:
            speed = float(row["images_per_s"])
        except (KeyError, TypeError, ValueError):
            speed = math.nan
        if not 0 <= speed < math.inf:
            raise UserError(f"line {number} of {path} has no images_per_s, a number of at least 0")
        values.append(speed)
    if not values:
        raise UserError(f"{path} has no row of an epoch")
    return values


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object")
    return value
