"""Base classes of methods on maps: adapted maps level by level, objects that count, cells that do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from yoloxkd.kd.adapters import AdapterKind, Adapters
from yoloxkd.kd.base import Distiller, KDConfig, Step
from yoloxkd.kd.functional.masks import CellSize, cell_size, excluded_cells
from yoloxkd.kd.functional.precision import full_precision
from yoloxkd.kd.pairing import LevelPair, Pairing
from yoloxkd.types import DetectorOutput, Grid, LossName, RoIOutput, Tap

Branch = Literal["neck", "cls", "reg"]
TAPS: dict[Branch, Tap] = {"neck": Tap.NECK, "cls": Tap.CLS, "reg": Tap.REG}


class BranchMaps(NamedTuple):
    """What a term of a `BranchDistiller` compares.

    term              its name
    student, teacher  (B, C, h, w), the student's after its adapter
    excluded          (B, h, w) bool, cells of padding and ignore regions
    """

    term: LossName
    student: Tensor
    teacher: Tensor
    excluded: Tensor


class BranchDistiller(Distiller):
    """A method with a term for each of the chosen branches at each level.

    Args:
        weight: of all terms; with 0 there is none.
    """

    def __init__(self, cfg: KDConfig, pairing: Pairing, branches: Sequence[Branch], weight: float) -> None:
        super().__init__(cfg, pairing)
        self.branches: tuple[Branch, ...] = tuple(dict.fromkeys(branches))
        taps = [TAPS[branch] for branch in self.branches]
        self.needs = frozenset(taps)
        self.adapters = Adapters(pairing, taps)
        names = [LossName(self.name, branch, level.stride) for level in pairing.levels for branch in self.branches]
        self.terms = tuple(names) if weight > 0 else ()

    def branch_maps(self, step: Step[Any]) -> Iterator[BranchMaps]:
        """The pairs of maps, level by level."""
        for level in self.pairing.levels:
            for branch in self.branches:
                tap = TAPS[branch]
                student, teacher = step.maps(tap, level)
                excluded = excluded_cells(step.batch, (teacher.shape[2], teacher.shape[3]), step.teacher.image_size)
                adapted = self.adapters(student, teacher, tap, level)
                yield BranchMaps(LossName(self.name, branch, level.stride), adapted, teacher, excluded)


@dataclass(frozen=True, slots=True)
class NeckLevel:
    """A pair of levels of a batch.

    student, teacher  (B, C, h, w) float32 (float64 stays), the student's after its adapter
    size              (h, w); cell: height and width px of a cell
    excluded          (B, h, w) bool, cells of padding and ignore regions
    """

    pair: LevelPair
    student: Tensor
    teacher: Tensor
    size: tuple[int, int]
    cell: CellSize
    excluded: Tensor


class NeckDistiller(Distiller):
    """A method that reads the neck's maps through adapters.

    taught  (student's classes,) bool on the device: whose objects this teacher answers for
    """

    taught: Tensor

    def __init__(self, cfg: KDConfig, pairing: Pairing, adapter: AdapterKind = "1x1", std: float | None = None) -> None:
        super().__init__(cfg, pairing)
        self.needs = frozenset({Tap.NECK})
        self.adapter = adapter
        self.adapters = Adapters(pairing, self.needs, adapter, std)
        self.register_buffer("taught", pairing.taught.clone(), persistent=False)
        self.answers_for_all = bool(pairing.taught.all())

    def levels(self, step: Step[Any]) -> Iterator[NeckLevel]:
        """The paired levels, finest first."""
        finest = step.teacher.features[0].shape[2:]
        for level in self.pairing.levels:
            student_map, teacher_map = step.maps(Tap.NECK, level)
            size, image_size = (teacher_map.shape[2], teacher_map.shape[3]), step.teacher.image_size
            yield NeckLevel(
                level,
                self.adapters(student_map, teacher_map, Tap.NECK, level),
                full_precision(teacher_map),
                size,
                cell_size(level.stride, (finest[0], finest[1]), self.pairing.teacher.strides[0], image_size),
                excluded_cells(step.batch, size, image_size),
            )

    def objects(self, step: Step[Any]) -> Tensor:
        """(B, G) bool, the ground truth that this teacher answers for."""
        targets = step.batch.targets
        return targets.mask if self.answers_for_all else targets.mask & self.taught[targets.labels]


def grid_of(out: DetectorOutput) -> Grid:
    """Where a dense detector predicts, or a two-stage detector's proposal network."""
    dense = out.rpn if isinstance(out, RoIOutput) else out
    grid: Grid = dense.grid  # type: ignore[attr-defined]
    return grid
