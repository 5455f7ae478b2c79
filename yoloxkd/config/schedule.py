"""The `schedule` section of a recipe: learning rate, and when strong augmentation ends."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from yoloxkd.config.strict import Strict


class ScheduleSection(Strict):
    """One of two schedules.

    yolox  quadratic warm-up over whole epochs, cosine, then a constant floor in the final epochs
    step   linear warm-up over iterations, then the peak, multiplied by `gamma` at each milestone (mmdetection's 1x, 2x, 3x)

    The final epochs run without mosaic and mixup, and YOLOX adds its L1 loss in them. A key of the other kind is refused
    unless it has its default.
    """

    KEYS: ClassVar[dict[str, tuple[str, ...]]] = {
        "yolox": ("warmup_epochs", "min_lr_ratio"),
        "step": ("warmup_iters", "warmup_ratio", "milestones", "gamma"),
    }

    kind: Literal["yolox", "step"] = "yolox"
    final_epochs: int | None = Field(
        None,
        ge=0,
        le=100_000,
        description="epochs without mosaic and with L1; None: yolox a tenth of the epochs, at most 15; step 0",
    )
    warmup_epochs: int | None = Field(
        None, ge=0, le=100_000, description="yolox; None: a tenth of the epochs, at least 1 and at most 5"
    )
    min_lr_ratio: float = Field(0.05, ge=0, le=1, description="yolox: the floor, as a part of the peak")
    warmup_iters: int | None = Field(None, ge=0, le=10**9, description="step; None: 500, at most a tenth of the run")
    warmup_ratio: float = Field(
        0.001, ge=0, le=1, description="step: rate of the first iteration, as a part of the peak"
    )
    milestones: list[int] | None = Field(
        None, description="step: epochs done before each fall; None: at 8 and 11 of 12, and in proportion"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="step: factor at each milestone")

    @field_validator("milestones")
    @classmethod
    def _rising(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (sorted(set(value)) != value or (value and not 1 <= value[0] <= value[-1] <= 100_000)):
            raise ValueError("should be numbers of epochs from 1 to 100000, each larger than the one before")
        return value

    @model_validator(mode="after")
    def _of_this_kind(self) -> Self:
        for other, keys in self.KEYS.items():
            for key in keys:
                if other != self.kind and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} belongs to schedule.kind {other}, and this one is {self.kind}")
        return self

    def warmup(self, epochs: int) -> int:
        """Epochs of warm-up of kind yolox in a run of `epochs`."""
        return max(1, min(5, epochs // 10)) if self.warmup_epochs is None else self.warmup_epochs

    def final(self, epochs: int) -> int:
        """Final epochs of a run of `epochs`."""
        if self.final_epochs is not None:
            return min(self.final_epochs, epochs)
        return min(15, epochs // 10) if self.kind == "yolox" else 0

    def warmup_steps(self, iterations: int) -> int:
        """Iterations of warm-up of kind step in a run of `iterations`."""
        return min(500, iterations // 10) if self.warmup_iters is None else self.warmup_iters

    def falls(self, epochs: int) -> list[int]:
        """Milestones of kind step in a run of `epochs`: 8 and 11 of 12, 16 and 22 of 24, 24 and 33 of 36."""
        if self.milestones is not None:
            return self.milestones
        return sorted({n for n in (epochs * 2 // 3, epochs * 11 // 12) if n})

    def describe(self, epochs: int) -> str:
        """The schedule of a run of `epochs` in words."""
        final = self.final(epochs)
        end = f"; the last {final} epochs without mosaic" if final else ""
        if self.kind == "yolox":
            return (
                f"yolox: quadratic warm-up of {self.warmup(epochs)} epoch(s), cosine to {self.min_lr_ratio:g} of the "
                f"peak{end}"
            )
        steps = (
            "500 iterations (at most a tenth of the run)"
            if self.warmup_iters is None
            else f"{self.warmup_iters} iterations"
        )
        where = ", ".join(str(n) for n in self.falls(epochs) if n < epochs)
        falls = f"times {self.gamma:g} after epoch {where}" if where else "no falls"
        return f"step: linear warm-up of {steps} from {self.warmup_ratio:g} of the peak, {falls}{end}"
