"""What student and teacher in two stages say of the same regions: their heads, classes by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yoloxkd.errors import UserError
from yoloxkd.kd.base import Step
from yoloxkd.kd.functional.divergence import image_means
from yoloxkd.kd.functional.precision import full_precision
from yoloxkd.kd.functional.predictions import box_code
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.rescaled_teacher import unwrapped
from yoloxkd.kd.second_pass import finite_gradient, frozen_statistics
from yoloxkd.nn.assigners.match import matched_boxes
from yoloxkd.nn.two_stage.box_code import decode
from yoloxkd.nn.two_stage.box_head import class_of, of_class
from yoloxkd.nn.two_stage.faster_rcnn import FasterRCNN
from yoloxkd.nn.two_stage.roi_detector import RoIMatch
from yoloxkd.ops.constants import constant
from yoloxkd.types import Loss, Losses, LossName, RoIOutput


@dataclass(frozen=True, slots=True)
class RegionPredictions:
    """What both heads say of S regions of each image, in float32 at least.

    regions           (B, S, 4) px
    student, teacher  (B, S, K + 1) logits of the classes that both know, background last
    boxes             the student's and the teacher's (B, S, 4) px, of one class each
    label             (B, S) that class among the K
    """

    regions: Tensor
    student: Tensor
    teacher: Tensor
    boxes: tuple[Tensor, Tensor]
    label: Tensor

    def codes(self) -> tuple[Tensor, Tensor]:
        """Both boxes relative to the regions: (B, S, 4) each. See `box_code`."""
        student, teacher = self.boxes
        return box_code(student, self.regions), box_code(teacher, self.regions)


@dataclass(frozen=True, slots=True)
class TrainedRegions:
    """The regions on which a stage of the student trains.

    positive, negative  (B, S) bool; a positive of a class that the teacher does not teach is neither
    truth               (B, S, 4) px, the box that a positive answers for
    """

    predictions: RegionPredictions
    positive: Tensor
    negative: Tensor
    truth: Tensor


def region_means(rows: Tensor, mask: Tensor) -> Tensor:
    """The mean over the regions of each image in the mask, averaged over images: (B, S), (B, S) bool -> scalar."""
    return image_means(rows.masked_fill(~mask, 0.0).sum(1), mask.sum(1))


class SameRegions(nn.Module):
    """Asks the heads of two detectors in two stages about the same regions.

    UserError: the teacher has none of the student's classes to teach.
    """

    is_shared: Tensor
    student_classes: Tensor
    teacher_classes: Tensor

    def __init__(self, pairing: Pairing, method: str) -> None:
        super().__init__()
        is_shared = (pairing.classes >= 0) & pairing.taught
        if not bool(is_shared.any()):
            raise UserError(
                f"--kd {method} compares class scores, and the teacher has none of the student's classes to teach; "
                "choose a teacher that knows some by name, or another --kd"
            )
        self.register_buffer("is_shared", is_shared, persistent=False)
        self.register_buffer("student_classes", is_shared.nonzero()[:, 0], persistent=False)
        self.register_buffer("teacher_classes", pairing.classes[is_shared], persistent=False)

    def forward(
        self, step: Step[RoIOutput], regions: Tensor, stage: int = 0, label: Tensor | None = None
    ) -> RegionPredictions:
        """Both heads on regions (B, S, 4) px.

        Args:
            stage: of both detectors.
            label: (B, S) the class, among those that both know, whose box is taken; None: the teacher's most probable one.
        """
        student, teacher = step.models.student, unwrapped(step.models.teacher)
        assert isinstance(student, FasterRCNN)
        assert isinstance(teacher, FasterRCNN)
        regions = full_precision(regions.detach())
        with frozen_statistics(student):
            student_out = student.roi(tuple(full_precision(x) for x in step.student.features), regions, stage)
        with torch.no_grad():
            scale = _scale(step, teacher, regions)
            teacher_out = teacher.roi(tuple(full_precision(x) for x in step.teacher.features), regions * scale, stage)
        logits = _of_classes(finite_gradient(student_out.cls_logits), self.student_classes)
        teacher_logits = _of_classes(teacher_out.cls_logits, self.teacher_classes)
        if label is None:
            label = teacher_logits[..., :-1].argmax(-1)
        code = of_class(finite_gradient(student_out.box_raw), self.student_classes[label])
        teacher_code = of_class(teacher_out.box_raw, self.teacher_classes[label])
        boxes = decode(regions, full_precision(code), student.roi_head.rules[stage].stds)
        teacher_boxes = (
            decode(regions * scale, full_precision(teacher_code), teacher.roi_head.rules[stage].stds) / scale
        )
        return RegionPredictions(regions, logits, teacher_logits, (boxes, teacher_boxes), label)

    def trained(self, step: Step[RoIOutput]) -> list[TrainedRegions]:
        """Both heads on the regions that the student trains on, stage by stage as far as both have stages."""
        match, targets = step.match, step.batch.targets
        assert isinstance(match, RoIMatch)
        place = self.is_shared.cumsum(0) - 1  # of a class among those that both know
        out = []
        for stage, (regions, assignment, _) in enumerate(
            zip(match.boxes, match.stages, step.teacher.stages, strict=False)
        ):
            label = class_of(assignment, targets, 0)
            positive = assignment.fg & self.is_shared[label]
            label = place[label].clamp_min(0)
            predictions = self(step, regions, stage, label)
            out.append(
                TrainedRegions(
                    predictions, positive, ~(assignment.fg | assignment.ignored), matched_boxes(assignment, targets)
                )
            )
        return out

    def losses(
        self,
        method: str,
        weights: Mapping[str, float],
        step: Step[RoIOutput],
        terms: Callable[[TrainedRegions], dict[str, Tensor]],
    ) -> Losses:
        """Weighted means over the stages of what `terms` makes of each stage's regions, under the names of `method`."""
        stages = [terms(stage) for stage in self.trained(step)]
        means = {term: torch.stack([stage[term] for stage in stages]).mean() for term in weights}
        return {LossName(method, term): Loss(means[term] * weight) for term, weight in weights.items()}


def _of_classes(logits: Tensor, classes: Tensor) -> Tensor:
    """Logits of some classes and of the background, which is last: (B, S, K + 1) -> (B, S, classes + 1)."""
    return torch.cat([full_precision(logits).index_select(-1, classes), full_precision(logits[..., -1:])], -1)


def _scale(step: Step[RoIOutput], teacher: FasterRCNN, like: Tensor) -> Tensor:
    """(4,) px of what the teacher saw for a px of the input, for the coordinates of a box."""
    (height, width), (h, w) = step.teacher.image_size, step.teacher.features[0].shape[2:]
    finest = teacher.spec.strides[0]
    x, y = w * finest / width, h * finest / height
    return constant((x, y, x, y), like.dtype, like.device)
