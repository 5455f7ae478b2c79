"""A checkpoint of ours as typed parts, validated once when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from yoloxkd.config.load import shown
from yoloxkd.config.recipe import MOST_EPOCHS, input_size
from yoloxkd.errors import UserError
from yoloxkd.types import ImageSize

Count = Annotated[int, Field(ge=0, le=10**15)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
State = dict[str, Tensor]
Part = TypeVar("Part", bound="SavedPart")


class SavedPart(BaseModel):
    """Values have the types they were written with: no text counts as a number. Keys of other versions may be there."""

    model_config = ConfigDict(strict=True, extra="allow", arbitrary_types_allowed=True)


class Measured(SavedPart):
    """Numbers of an evaluation: any over all classes by name, those of each class, and the error types."""

    per_class: dict[str, dict[str, float]]
    errors: dict[str, dict[str, float | int]] = {}
    __pydantic_extra__: dict[str, float]


class SavedAverages(SavedPart):
    """As `ModelEMA.state_dict`."""

    module: State
    updates: Count


class SavedOptimizer(SavedPart):
    """Of `Optimizer.state_dict`, what the recipe does not say: what it keeps of each parameter, by number, and AdamW's rates."""

    state: dict[int, dict[str, Tensor | None]]
    param_groups: list[dict[str, Any]] = []


class SavedBest(SavedPart):
    """As `events.BestEpoch`."""

    value: Finite
    epoch: Count
    metrics: Measured | Annotated[dict[str, Any], Field(max_length=0)]


class SavedNumpy(SavedPart):
    key: Tensor
    pos: int
    has_gauss: int
    gauss: float


class SavedRandom(SavedPart):
    """As `checkpoint.random_state`."""

    python: list[Any]
    numpy: SavedNumpy
    torch: Tensor
    cuda: list[Tensor] = []


SavedSum = Annotated[tuple[str, str, int | None, float], Field(strict=False)]  # strict would refuse the list that it is
"""Source, term, level and value of a loss."""


class SavedRun(SavedPart):
    """As `resume.run_state`.

    callbacks  what each callback remembers, by its name; it checks that itself, by `checked_state`
    """

    epoch: Annotated[int, Field(ge=0, le=MOST_EPOCHS)]
    step_in_epoch: Count
    iteration: Count
    lr: Finite
    sums: list[SavedSum] | dict[str, float]  # a mapping in version 0.1.0
    best: SavedBest | None
    metrics: Measured | Annotated[dict[str, Any], Field(max_length=0)]
    evaluated: Count | None
    stop: bool = False
    aux: State
    optimizer: SavedOptimizer | None
    scaler: dict[str, Finite] | None
    ema: SavedAverages | None
    callbacks: dict[str, dict[str, Any]]
    rng: SavedRandom


class SavedData(SavedPart):
    """As `data.fingerprint`, of one split."""

    images: Count
    objects: Count
    ignored: Count
    digest: str


class Saved(SavedPart):
    """A `best.pt` (kind student) or a `last.pt` (kind run).

    student  section of the model: {name, keys of its Config}
    names    class names, in label order
    imgsz    input size the model was trained at; None where it is not known
    model    weights; of a run the raw ones, the averaged ones are in `run.ema`
    recipe   of a run: the resolved recipe, checked when the run is resumed
    quantize   of a student trained for int8: that section of its recipe; its weights have the ranges of activations beside them
    data     split -> what it held when the run began
    """

    kind: Literal["student", "run"]
    version: str = "0.1.0"
    student: dict[str, Any]
    names: list[str] = Field(min_length=1)
    imgsz: ImageSize | None = None
    model: State
    recipe: dict[str, Any] | None = None
    quantize: dict[str, Any] | None = None
    data: dict[str, SavedData] = {}
    images_per_second: Finite = 0.0
    run: SavedRun | None = None

    @field_validator("names")
    @classmethod
    def _different(cls, value: list[str]) -> list[str]:
        if not all(value) or len(set(value)) < len(value):
            raise ValueError("should be class names, none empty and none twice")
        return value

    @field_validator("imgsz", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return None if value is None else input_size(value)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if "name" not in self.student:
            raise ValueError("student should have the key 'name'")
        if self.kind == "run" and (self.run is None or self.recipe is None):
            raise ValueError("a run's checkpoint should have the keys 'run' and 'recipe'")
        return self

    @property
    def weights(self) -> State:
        """Those to predict with: averaged where there are averaged ones."""
        return self.run.ema.module if self.run and self.run.ema else self.model


def read_saved(raw: Mapping[str, Any], path: Path) -> Saved:
    """A loaded file of ours (see `checkpoint.is_checkpoint`), checked.

    Args:
        raw: In the layout of this version (`assembly.older_checkpoints.current_layout` makes it so).
        path: Of the file, for messages.

    Raises:
        UserError: A part is missing or not what it should be.
    """
    return checked(Saved, raw, f"checkpoint {path}")


def checked(kind: type[Part], raw: Any, where: str) -> Part:
    """A part of a checkpoint, checked; `where` names the file, or the part of it. UserError as `read_saved`."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"] if not (isinstance(part, str) and "[" in part))
        place = f"its '{key}'" if key else "it"
        value = "" if fault["type"] == "missing" or not key else f", and is {_shown(fault['input'])}"
        reason = "is missing" if fault["type"] == "missing" else _should(fault["msg"])
        raise UserError(
            f"{where} was changed or is damaged: {place} {reason}{value}; use another copy of the file"
        ) from error


def checked_state(kind: type[Part], saved: Mapping[str, Any], name: str) -> Part:
    """What last.pt has of the callback `name`, checked. UserError: it was changed."""
    return checked(kind, saved, f"what last.pt has of the callback '{name}'")


def _should(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    return message[0].lower() + message[1:]


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}" if isinstance(value, dict | list | tuple) else shown(value)
