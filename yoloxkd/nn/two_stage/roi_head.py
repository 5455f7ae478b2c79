"""The second stage of a two-stage detector: one box head, or several in a cascade (Cai and Vasconcelos 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yoloxkd.nn.assigners.match import Match
from yoloxkd.nn.assigners.max_iou import max_iou_match
from yoloxkd.nn.two_stage.box_code import clip, decode
from yoloxkd.nn.two_stage.box_head import BoxHead, HeadForm, StageRule, of_class, stage_losses
from yoloxkd.nn.two_stage.roi_align import roi_features
from yoloxkd.nn.two_stage.sampling import Stream, gathered, random_keys, sample, with_boxes
from yoloxkd.ops.boxes import area
from yoloxkd.ops.constants import constant
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Draw, Loss, Losses, RoIStage, Targets, task_losses

STRIDES = (4, 8, 16, 32)
Maps = Sequence[Tensor]
COVERED = 0.5
"""A region of which ignore regions cover this share, and that is not positive, is no background."""


@dataclass(frozen=True, slots=True)
class Pooling:
    """RoIAlign's settings; see `roi_features`."""

    size: int = 7
    sampling: int = 0
    aligned: bool = True


def assign_regions(regions: Tensor, used: Tensor, targets: Targets, rule: StageRule) -> Match:
    """Who answers for what among regions (B, P, 4) px, before the boxes themselves are added; used (B, P) bool.

    Ignored are slots without a region, regions without area, and those that an ignore region covers by half.
    """
    match = max_iou_match(
        regions,
        targets,
        positive=rule.iou,
        negative=rule.iou,
        claim=rule.iou if rule.low_quality else None,
        usable=used & (area(regions) > 0),
    )
    match.ignored |= covered(regions, targets.boxes, targets.ignore) & ~match.fg
    return match


def covered(regions: Tensor, boxes: Tensor, ignore: Tensor) -> Tensor:
    """Whether an ignore region covers at least half of a region: (B, R, 4) px, (B, G, 4) px, (B, G) bool -> (B, R) bool."""
    if ignore.shape[1] == 0:
        return torch.zeros(regions.shape[:2], dtype=torch.bool, device=regions.device)
    low = torch.maximum(regions[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(regions[:, :, None, 2:], boxes[:, None, :, 2:])
    intersection = (high - low).clamp(min=0).prod(-1).masked_fill(~ignore.unsqueeze(1), 0).amax(-1)
    return intersection >= COVERED * area(regions).clamp(min=1e-6)


def sampled_regions(
    regions: Tensor, used: Tensor, targets: Targets, rule: StageRule, keys: Tensor
) -> tuple[Tensor, Match, Tensor]:
    """The regions that a stage trains on, in `rule.samples` slots.

    Args:
        regions: (B, P, 4) px; used: (B, P) bool
        keys: (B, P + G) int64 random, of the regions, then of the boxes
    Returns:
        boxes (B, S, 4) px, zero in unused slots; their match; which of them are proposals, not the boxes to learn, (B, S)
    """
    count = regions.shape[1]
    boxes, match = with_boxes(regions, assign_regions(regions, used, targets, rule), targets)
    keys = torch.cat((keys[:, count:], keys[:, :count]), 1)
    index, sampled = gathered(sample(match, rule.samples, rule.positive_share, keys), rule.samples)
    some = boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4)).masked_fill(sampled.ignored.unsqueeze(-1), 0)
    return some, sampled, ~sampled.ignored & (index >= targets.mask.shape[1])


def best_pairs(boxes: Tensor, scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The `most` best pairs of a region and a class, as candidates of one class each.

    boxes (B, P, K, 4) px, or (B, P, 1, 4) for all classes alike; scores (B, P, K) -> (B, N, 4), and (B, N, K) with one
    score a row that is not zero
    """
    classes = scores.shape[2]
    best = scores.flatten(1).topk(min(most, scores.shape[1] * classes), dim=1)
    label = best.indices.remainder(classes).unsqueeze(-1)
    region = best.indices.div(classes, rounding_mode="floor")
    place = region if boxes.shape[2] == 1 else best.indices
    best_boxes = boxes.flatten(1, 2).gather(1, place.unsqueeze(-1).expand(-1, -1, 4))
    by_class = torch.zeros(*label.shape[:2], classes, dtype=scores.dtype, device=scores.device)
    return best_boxes, by_class.scatter(2, label, best.values.unsqueeze(-1))


def millions(module: nn.Module) -> str:
    """How many parameters a module has."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"


class RoIHead(nn.Module):
    """Box heads, one a stage; each refines the regions of the one before.

    rules: one a stage; form: of the box heads; strides: of the maps that they read
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        rules: Sequence[StageRule],
        *,
        form: HeadForm = HeadForm(),
        pooling: Pooling = Pooling(),
        strides: Sequence[int] = STRIDES,
    ) -> None:
        super().__init__()
        self.rules, self.pooling, self.strides = tuple(rules), pooling, tuple(strides)
        self.bbox_head = nn.ModuleList(
            BoxHead(channels, pooling.size, form, classes, agnostic=rule.agnostic) for rule in rules
        )

    def stage_name(self, number: int) -> str:
        """What a stage's losses are called: `roi`, or of a cascade's stages `roi1`, `roi2`, ..."""
        return "roi" if len(self.rules) == 1 else f"roi{number + 1}"

    def stage_lines(self) -> dict[str, str]:
        """What each stage reads and gives: the name of its losses -> a line."""
        size = self.pooling.size
        return {
            self.stage_name(number): f"{size} x {size} cells of a region -> its class, and a box "
            f"{'for all classes alike' if rule.agnostic else 'of every class'}; {millions(self.bbox_head[number])}; "
            f"{rule.samples} regions of an image train, positive from IoU {rule.iou:g}"
            for number, rule in enumerate(self.rules)
        }

    def pooled(self, maps: Maps, boxes: Tensor, pooling: Pooling) -> Tensor:
        """(B, P, C, s, s) features of regions (B, P, 4) px."""
        return roi_features(maps, self.strides, boxes, pooling.size, sampling=pooling.sampling, aligned=pooling.aligned)

    def roi(self, maps: Maps, boxes: Tensor, stage: int = 0) -> RoIStage:
        """What a stage says of regions (B, P, 4) px on maps of these strides."""
        pooled = self.pooled(maps, boxes, self.pooling)
        logits, code = self.bbox_head[stage](pooled)
        raw, regions = full_precision(code), full_precision(boxes)
        class_code = of_class(raw, logits[..., :-1].argmax(-1))
        return RoIStage(pooled, logits, code, decode(regions, class_code, self.rules[stage].stds), regions)

    def refined(self, stage: RoIStage, areas: Tensor) -> Tensor:
        """The boxes that a stage hands to the next, cut at areas (B, 2) px, without gradient."""
        return clip(stage.boxes.detach(), areas)

    def stages(self, maps: Maps, proposals: Tensor) -> tuple[RoIStage, ...]:
        """All stages, one after the other, on an image's proposals (B, P, 4) px."""
        areas = self.input_areas(maps)
        out = [self.roi(maps, proposals, 0)]
        for number in range(1, len(self.rules)):
            out.append(self.roi(maps, self.refined(out[-1], areas), number))
        return tuple(out)

    def input_areas(self, maps: Maps) -> Tensor:
        """(B, 2) width and height px of the input that the maps come from."""
        images, _, h, w = maps[0].shape
        size = constant(((w * self.strides[0], h * self.strides[0]),), torch.float32, maps[0].device)
        return size.expand(images, 2)

    def scores(self, stages: Sequence[RoIStage]) -> Tensor:
        """(B, P, K) the softmax of the stages' mean logits, without the background."""
        logits = torch.stack([full_precision(stage.cls_logits) for stage in stages]).mean(0)
        return logits.softmax(-1)[..., :-1]

    def boxes(self, stages: Sequence[RoIStage], areas: Tensor) -> Tensor:
        """(B, P, K, 4) px, or (B, P, 1, 4): the last stage's boxes of every class, cut at areas (B, 2) px."""
        last = stages[-1]
        code = full_precision(last.box_raw).unflatten(-1, (-1, 4))
        return clip(decode(last.regions.unsqueeze(2), code, self.rules[-1].stds), areas)

    @torch.no_grad()
    def assign(
        self, maps: Maps, proposals: Tensor, used: Tensor, targets: Targets, draw: Draw, areas: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Match, ...]]:
        """The regions that every stage trains on, (B, S, 4) px each, and their matches.

        A stage behind the first gets what the one before makes of its regions, without the boxes to learn among them.
        """
        regions, matches = [], []
        boxes = clip(proposals, areas)
        for number, rule in enumerate(self.rules):
            count = boxes.shape[1] + targets.mask.shape[1]
            keys = random_keys(draw, Stream.ROI + number, len(boxes), count, boxes.device)
            some, match, is_proposal = sampled_regions(boxes, used, targets, rule, keys)
            regions.append(some)
            matches.append(match)
            if number + 1 < len(self.rules):
                boxes, used = self.refined(self.roi(maps, some, number), areas), is_proposal
        return tuple(regions), tuple(matches)

    def losses(self, maps: Maps, targets: Targets, regions: Sequence[Tensor], matches: Sequence[Match]) -> Losses:
        """`roi/cls` and `roi/box` of the sampled regions; of a cascade's stages `roi1/cls`, `roi1/box`, `roi2/cls`, ..."""
        terms: dict[str, Loss] = {}
        for number, (rule, some, match) in enumerate(zip(self.rules, regions, matches, strict=True)):
            output = self.roi(maps, some, number)
            name = self.stage_name(number)
            with torch.autocast(some.device.type, enabled=False):
                cls, box = stage_losses(output.cls_logits, output.box_raw, output.regions, targets, match, rule)
            terms |= {f"{name}/cls": cls, f"{name}/box": box}
        return task_losses(**terms)
