"""Where a method's loss lies on the student's maps: on which levels, on how few channels, on how few cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from yoloxkd.engine.step import StudentPass
from yoloxkd.kd.teacher_losses import TeacherLosses, TeacherMethod
from yoloxkd.types import LossName, Tap

TOP_CHANNELS, TOP_CELLS = 0.05, 0.01


@dataclass(frozen=True, slots=True)
class Concentration:
    """A method's loss on one map of the student, split over its channels and cells by |gradient x (student - teacher)|,
    which of a squared difference is twice the loss itself; by |gradient| where the two maps differ in shape.

    Attributes:
        source: the method, as in `LossName`
        tap: which maps, such as `cls`
        stride: px
        share: of the method's whole, over all its maps
        channels: of the map
        top_channels: the largest twentieth of them, one at least
        channel_share: what these carry of this map's part
        cell_share: what the largest hundredth of the cells carries of it
    """

    source: str
    tap: str
    stride: int
    share: float
    channels: int
    top_channels: int
    channel_share: float
    cell_share: float


@dataclass(slots=True)
class _Map:
    by_channel: Tensor
    cells: list[Tensor]


@dataclass(slots=True)
class MapWatch:
    """Takes in what a teacher's methods compare, batch by batch."""

    module: TeacherLosses
    _student: StudentPass | None = None
    _teacher: Any = None
    _maps: dict[tuple[str, Tap, int], _Map] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within: the outputs of student and teacher are noted in each forward pass."""

        def student(_: Any, arguments: tuple[StudentPass]) -> None:
            self._student = arguments[0]

        def teacher(_: Any, arguments: Any, out: Any) -> None:
            self._teacher = out

        hooks = [
            self.module.register_forward_pre_hook(student),
            self.module.teacher.register_forward_hook(teacher),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, losses: Mapping[LossName, Tensor]) -> None:
        """Take in a batch, by its losses with their graph, which is kept."""
        for method in self.module.methods.values():
            maps = dict(self._pairs(method))
            total = torch.stack([losses[name] for name in method.names]).sum()
            if not maps or not total.requires_grad:
                continue
            students = [student for student, _ in maps.values()]
            gradients = torch.autograd.grad(total, students, retain_graph=True, allow_unused=True)
            for key, (student, teacher), gradient in zip(maps, maps.values(), gradients, strict=True):
                if gradient is not None:
                    self._take(key, student.detach(), teacher, gradient)

    def result(self) -> list[Concentration]:
        """What all batches together say."""
        out = []
        for (source, tap, stride), one in self._maps.items():
            whole = sum(float(m.by_channel.sum()) for (other, _, _), m in self._maps.items() if other == source)
            channels = len(one.by_channel)
            top = max(1, round(TOP_CHANNELS * channels))
            part = float(one.by_channel.sum())
            shares = [_top_share(cells, max(1, round(TOP_CELLS * len(cells)))) for cells in one.cells]
            out.append(
                Concentration(
                    source,
                    tap.name.lower(),
                    stride,
                    part / whole if whole > 0 else 0.0,
                    channels,
                    top,
                    _top_share(one.by_channel, top),
                    sum(shares) / len(shares),
                )
            )
        return out

    def _pairs(self, method: TeacherMethod) -> Iterator[tuple[tuple[str, Tap, int], tuple[Tensor, Tensor]]]:
        assert self._student is not None
        for tap in Tap:
            if tap in method.distiller.needs and tap != Tap.ROI:
                for level in method.distiller.pairing.levels_of(tap):
                    student = getattr(self._student.out, tap)[level.student]
                    if student.requires_grad:
                        yield (method.source, tap, level.stride), (student, getattr(self._teacher, tap)[level.teacher])

    def _take(self, key: tuple[str, Tap, int], student: Tensor, teacher: Tensor, gradient: Tensor) -> None:
        weight = (gradient * (student - teacher) if student.shape == teacher.shape else gradient).abs().float()
        by_channel = weight.sum((0, 2, 3))
        sums = self._maps.setdefault(key, _Map(torch.zeros_like(by_channel), []))
        sums.by_channel += by_channel
        sums.cells.append(weight.sum(1).flatten())


def _top_share(values: Tensor, number: int) -> float:
    whole = float(values.sum())
    return float(values.topk(number).values.sum()) / whole if whole > 0 else 0.0


def concentration(watches: Sequence[MapWatch]) -> list[Concentration]:
    """Of every teacher's methods."""
    return [one for watch in watches for one in watch.result()]
