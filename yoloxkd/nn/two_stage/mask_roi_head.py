"""The second stage with masks (Mask R-CNN, He et al. 2017): a mask head beside every box head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from yoloxkd.nn.assigners.match import Match
from yoloxkd.nn.two_stage.box_head import HeadForm, StageRule, class_of
from yoloxkd.nn.two_stage.mask_head import MaskHead, class_channel, mask_loss, sampled_targets
from yoloxkd.nn.two_stage.roi_head import STRIDES, Maps, Pooling, RoIHead, millions
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Loss, Losses, Targets, task_losses

MASK_SIZE = 14
"""Cells of a side that a mask head reads; it gives twice as many."""


class MaskRoIHead(RoIHead):
    """Box heads and mask heads, one of each a stage; at test all mask heads look at the last stage's boxes.

    mask_hidden, mask_convs: width and number of a mask head's convolutions; the rest as `RoIHead`
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
        mask_hidden: int = 256,
        mask_convs: int = 4,
    ) -> None:
        super().__init__(channels, classes, rules, form=form, pooling=pooling, strides=strides)
        self.mask_pooling = Pooling(MASK_SIZE, pooling.sampling, pooling.aligned)
        self.mask_head = nn.ModuleList(
            MaskHead(channels, classes, hidden=mask_hidden, convs=mask_convs, norm=form.norm) for _ in rules
        )

    def stage_lines(self) -> dict[str, str]:
        size = self.mask_pooling.size
        lines = {
            f"{self.stage_name(number)}/mask": f"{size} x {size} cells of a region -> {2 * size} x {2 * size} of a mask of "
            f"every class; {millions(head)}; positives train"
            for number, head in enumerate(self.mask_head)
        }
        return super().stage_lines() | lines

    def mask_logits(self, maps: Maps, boxes: Tensor, stage: int = 0) -> Tensor:
        """What a stage's mask head says of regions (B, P, 4) px: (B, P, K, s, s)."""
        pooled = self.pooled(maps, boxes, self.mask_pooling)
        logits: Tensor = self.mask_head[stage](pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2])
        return logits

    def mask_probability(self, maps: Maps, boxes: Tensor, labels: Tensor) -> Tensor:
        """Mask of each box (B, P, 4) px for its class (B, P), mean of the stages: (B, P, s, s), 0 to 1."""
        of_stages = [
            class_channel(
                full_precision(self.mask_logits(maps, boxes, number)).flatten(0, 1), labels.flatten()
            ).sigmoid()
            for number in range(len(self.rules))
        ]
        probability: Tensor = torch.stack(of_stages).mean(0).unflatten(0, labels.shape)
        return probability

    def losses(self, maps: Maps, targets: Targets, regions: Sequence[Tensor], matches: Sequence[Match]) -> Losses:
        """Those of the boxes, and `roi/mask` (`roi1/mask`, ... of a cascade) of positives whose object has a mask."""
        terms: dict[str, Loss] = {}
        for number, (rule, boxes, match) in enumerate(zip(self.rules, regions, matches, strict=True)):
            slots = positive_slots(match, rule)  # positives come first
            some = Match(match.fg[:, :slots], match.gt[:, :slots], match.ignored[:, :slots])
            logits = self.mask_logits(maps, boxes[:, :slots], number).flatten(0, 1)
            labels = class_of(some, targets, 0).flatten()
            target_masks, used = sampled_targets(targets, some.gt, boxes[:, :slots], logits.shape[-1])
            with torch.autocast(boxes.device.type, enabled=False):
                loss = mask_loss(logits, labels, target_masks.flatten(0, 1), used.flatten())
            terms[f"{self.stage_name(number)}/mask"] = Loss(loss.total * rule.weight, loss.count)
        return super().losses(maps, targets, regions, matches) | task_losses(**terms)


def positive_slots(match: Match, rule: StageRule) -> int:
    """In how many of a stage's first slots its positives lie.

    The number that the rule allows, so that nothing waits for the device; on a CPU, which never waits, no more than are
    in use.
    """
    most = min(int(rule.samples * rule.positive_share), match.fg.shape[1])
    return max(1, int(match.fg.sum(1).amax())) if match.fg.device.type == "cpu" else most
