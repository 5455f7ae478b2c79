"""Typed recipe: everything a training run depends on, one section a room.

`student`, `kd` and `callbacks` hold the Config objects of the chosen detector, distillers and callbacks. Their classes lie
on floors above this one; `assembly.recipes` parses them when a recipe is resolved, before any data is touched.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from yoloxkd.config.augment import Augment
from yoloxkd.config.quantization import QuantizeSection
from yoloxkd.config.schedule import ScheduleSection
from yoloxkd.config.strict import MOST_INT, Strict
from yoloxkd.nms_defaults import CONF, IOU, MAX_DET
from yoloxkd.types import ImageSize

Amp = Literal["auto", "off", "bf16", "fp16"]

MOST_EPOCHS = 100_000
MOST_BATCH = 65_536
MOST_WORKERS = 1024
SIDES = (32, 16_384)
"""Least and largest side of the network's input, px."""


def input_size(value: Any) -> ImageSize:
    """An input size as files hold it, a number or a list of one or two. ValueError: it is none."""
    sides = [value] if isinstance(value, int) else value
    least, most = SIDES
    whole = isinstance(sides, list | tuple) and all(type(side) is int and least <= side <= most for side in sides)
    if not whole or len(sides) not in (1, 2) or sides[0] > sides[-1]:
        raise ValueError(f"should be a side of {least} to {most} px, or two such sides, the short one first")
    return (sides[0], sides[1]) if len(sides) == 2 else sides[0]


class Student(Strict):
    """The model that is trained.

    In files the keys of `config` (for YOLOX: depth, width, ...) stand beside `name` and `weights`.
    """

    name: str = Field(description="architecture, e.g. yolox-nano")
    weights: str | None = Field(None, description="start from this checkpoint file or NAME@coco; None: untrained")
    config: SerializeAsAny[Strict] = Field(description="the Config of the architecture's family")

    @model_serializer(mode="wrap")
    def _one_section(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        section: dict[str, Any] = serialize(self)
        config: dict[str, Any] = section.pop("config")
        return section | config


class TeacherSection(Strict):
    """Whom the student learns from."""

    models: list[str] = Field(default_factory=list, description="NAME, NAME@coco or checkpoint file")
    names: list[list[str] | None] = Field(
        default_factory=list,
        description="class names of a teacher whose file has none: a list, names with commas between, or a file of one a "
        "line; with several teachers a list of lists, null for a file that has names",
    )
    weight: list[Annotated[float, Field(gt=0, le=1e6)]] = Field(
        default_factory=list, description="factor on what each of `models` teaches; empty: 1 each"
    )
    scale: float = Field(1.0, gt=0, le=8, description="teachers see the batch at this multiple of its size")
    min_ap: float = Field(
        0.05, ge=0, le=1, description="refuse a teacher below this AP on the validation set; 0: no check"
    )
    gate_images: int = Field(200, ge=1, le=MOST_INT, description="validation images the teacher is checked on, at most")

    @field_validator("models", "weight", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        """One teacher or weight as a list of one."""
        return [value] if isinstance(value, str | int | float) and not isinstance(value, bool) else value

    @field_validator("names", mode="before")
    @classmethod
    def _as_lists(cls, value: Any) -> Any:
        """One teacher's names as a list of one list."""
        entries = [value] if isinstance(value, str) or _all_names(value) else value
        return [_split(entry) for entry in entries] if isinstance(entries, list | tuple) else entries

    @field_validator("names")
    @classmethod
    def _different(cls, value: list[list[str] | None]) -> list[list[str] | None]:
        for names in value:
            if names is not None and (not names or not all(names) or len(set(names)) < len(names)):
                raise ValueError("should be the names of a teacher's classes, none empty and none twice")
        return value

    @model_validator(mode="after")
    def _for_each(self) -> Self:
        if self.names and len(self.names) != len(self.models):
            raise ValueError(
                f"teacher.names has {len(self.names)} list(s) of names for {len(self.models)} teacher(s); give a list of "
                "lists, one for each teacher in their order, and null for a teacher whose file has names"
            )
        return self


def _all_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, str) for entry in value)


def _split(entry: Any) -> Any:
    return [name.strip() for name in entry.split(",")] if isinstance(entry, str) else entry


class TrainSection(Strict):
    """How long, on what size, from which seed."""

    epochs: int = Field(300, ge=1, le=MOST_EPOCHS)
    batch: int = Field(
        16, ge=1, le=MOST_BATCH, description="images a step, over all processes and parts; auto: measure what fits"
    )
    measure_batch: bool = Field(False, description="batch is still to be measured (what batch: auto means)")
    accumulate: int = Field(
        1, ge=1, le=MOST_BATCH, description="take a batch in so many parts, one after the other; less memory"
    )
    imgsz: ImageSize = Field(
        640,
        description="px: height and width of the network input, a multiple of the coarsest stride; or [short, long], "
        "within which images keep their aspect ratio",
    )
    seed: int = Field(0, ge=0, le=MOST_INT, description="fixes initial weights, sample order and augmentation")

    @field_validator("imgsz", mode="before")
    @classmethod
    def _size(cls, value: Any) -> ImageSize:
        return input_size(value)

    @model_validator(mode="before")
    @classmethod
    def _measured(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("batch") == "auto":
            return {k: v for k, v in value.items() if k != "batch"} | {"measure_batch": True}
        return value


class EngineSection(Strict):
    """Device, precision and housekeeping; none of it changes the recipe's mathematics."""

    device: str = Field("auto", description="auto, cpu, cuda or a CUDA index; 0,1: one for each process")
    amp: Amp = Field(
        "auto", description="autocast dtype; losses stay float32. auto: bf16 on a GPU that has it, else fp16; CPU: off"
    )
    workers: Annotated[int, Field(ge=0, le=MOST_WORKERS)] | Literal["auto"] = Field(
        "auto",
        description="loader processes; samples do not depend on their number. auto: as many as cores beside a GPU, at "
        "most 12; beside a CPU 2",
    )
    cache: Literal["off", "ram", "disk"] = Field(
        "off", description="keep decoded images in memory or in files; samples are the same"
    )
    channels_last: bool | Literal["auto"] = Field(
        "auto",
        description="NHWC memory format for convolutions. auto: on; off beside a CPU for detectors on an FPN, whose wide "
        "convolutions take up to twice the time backward in it",
    )
    tf32: bool = Field(True, description="CUDA: convolutions in TensorFloat-32; losses stay float32")
    deterministic: bool = Field(False, description="algorithms that give the same result every time, CUDA's too")
    sync_bn: bool = Field(False, description="CUDA: batch statistics over all processes")
    compile: bool = Field(
        False, description="torch.compile student and teachers; give it a fixed size: augment.multiscale=0"
    )
    max_nonfinite: int = Field(10, ge=1, description="stop after this many steps with a non-finite loss")

    @field_validator("amp", "cache", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as False

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        """One sentence instead of one for each member of the union."""
        if value == "auto" or (type(value) is int and 0 <= value <= MOST_WORKERS):
            return value
        raise ValueError(f"should be a whole number from 0 to {MOST_WORKERS}, or auto")

    @field_validator("channels_last", mode="before")
    @classmethod
    def _switch_or_auto(cls, value: Any) -> Any:
        """One sentence instead of one for each member of the union."""
        if value == "auto" or isinstance(value, bool):
            return value
        raise ValueError("should be true, false or auto")

    @field_validator("device", mode="before")
    @classmethod
    def _index(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class OptimSection(Strict):
    """The optimizer; the learning rate is given per image so that it follows the batch size (the YOLOX rule)."""

    kind: Literal["sgd", "adam"] = Field(
        "sgd", description="adam: AdamW; the rate is relative to the size of each tensor's values at the start"
    )
    lr_per_image: float = Field(0.01 / 64, gt=0, le=10)
    momentum: float = Field(0.9, ge=0, lt=1, description="of AdamW the decay of the mean gradient")
    nesterov: bool = Field(True, description="of SGD")
    weight_decay: float = Field(5e-4, ge=0, le=10)
    decay: Literal["weights", "all"] = Field(
        "weights",
        description="what decays: convolution weights only (YOLOX), or norms and biases as well (mmdetection)",
    )
    bias_lr: float = Field(1.0, gt=0, le=1000, description="factor on the rate of biases; mmdetection's FCOS has 2")
    clip_norm: float | None = Field(None, gt=0, le=1e6, description="gradient norm limit; None: no clipping")


class EmaSection(Strict):
    """Averaged weights: decay * (1 - exp(-updates / ramp))."""

    enabled: bool = True
    decay: float = Field(0.9998, gt=0, lt=1)
    ramp: float = Field(2000, gt=0, le=1e9, description="updates")


class ValSection(Strict):
    """How the student is measured during training, and models in `yoloxkd val`."""

    split: str = "val"
    interval: int | None = Field(
        None, ge=1, le=MOST_EPOCHS, description="epochs between evaluations; None: a thirtieth of the run"
    )
    conf: float = Field(CONF, ge=0, le=1)
    iou: float = Field(IOU, gt=0, le=1, description="NMS IoU threshold")
    max_det: int = Field(
        MAX_DET, ge=1, le=100_000, description="detections kept an image; the metric cuts to 100 a class"
    )
    rect: bool = Field(
        False,
        description="square sizes: pad each batch no further than its largest image needs, images sorted by aspect "
        "ratio; sizes of two sides always do so",
    )
    backend: Literal["hotcoco", "pycocotools"] = "hotcoco"
    metric: str = Field(
        "AP", description="the number over all classes that chooses the best epoch: AP of boxes, mask_AP of masks, ..."
    )

    def every(self, epochs: int) -> int:
        return max(1, epochs // 30) if self.interval is None else self.interval


class Recipe(Strict):
    """A training run, resolved: what `recipe.yaml` in a run's folder holds and what `yoloxkd show` prints."""

    student: Student
    teacher: TeacherSection = Field(default_factory=TeacherSection)
    kd: dict[str, SerializeAsAny[Strict]] = Field(default_factory=dict, description="{method: its Config}")
    data: str = "coco"
    train: TrainSection = Field(default_factory=TrainSection)
    quantize: QuantizeSection = Field(default_factory=QuantizeSection)
    engine: EngineSection = Field(default_factory=EngineSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    ema: EmaSection = Field(default_factory=EmaSection)
    augment: Augment = Field(default_factory=Augment)
    val: ValSection = Field(default_factory=ValSection)
    callbacks: dict[str, SerializeAsAny[Strict] | Literal[False]] = Field(
        default_factory=dict, description="{callback: its Config, or false for off}"
    )

    @model_validator(mode="after")
    def _square_operations(self) -> Self:
        if isinstance(self.train.imgsz, int):
            if self.augment.short_sides:
                raise ValueError(
                    "augment.short_sides draws the short side of sizes of two sides, and train.imgsz is one number; "
                    "set train.imgsz=[SHORT, LONG], or augment.short_sides=[]"
                )
            return self
        if self.augment.mosaic > 0 or self.augment.multiscale != (0, 0):
            raise ValueError(
                f"train.imgsz {list(self.train.imgsz)} keeps the aspect ratio of images, which mosaics and multiscale "
                "cannot: set augment.mosaic=0 and augment.multiscale=0 (augment.short_sides varies the size), or give "
                "train.imgsz one number"
            )
        if any(side > self.train.imgsz[1] for side in self.augment.short_sides):
            raise ValueError(
                f"augment.short_sides {self.augment.short_sides} should not be above the long side of train.imgsz "
                f"{list(self.train.imgsz)}"
            )
        return self
