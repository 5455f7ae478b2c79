"""The `RoIDetector` contract: proposals of a dense detector, then heads that classify and refine them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from yoloxkd.nn.assigners.match import Match
from yoloxkd.nn.detector import Detector
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import RoIOutput, RoIStage


@dataclass(slots=True)
class RoIMatch:
    """Who answers for what in two stages.

    rpn     of the proposal network
    boxes   one (B, S, 4) px a stage, the regions that the stage trains on, in as many slots for every image
    stages  of these regions, one a stage; slots that hold none are ignored
    """

    rpn: Match
    boxes: tuple[Tensor, ...]
    stages: tuple[Match, ...]


class RoIDetector(Detector[RoIOutput, RoIMatch]):
    """A detector whose heads can be asked about anybody's regions."""

    channels_last_on_cpu = False

    @abstractmethod
    def roi(self, features: tuple[Tensor, ...], boxes: Tensor, stage: int = 0) -> RoIStage:
        """What a stage says of the regions (B, P, 4) px on an image's neck maps."""

    def candidates(self, out: RoIOutput) -> tuple[Tensor, Tensor]:
        """The last stage's boxes, and its classes' softmax without the background; 0 where a slot holds no proposal."""
        last = out.stages[-1]
        scores = full_precision(last.cls_logits).softmax(-1)[..., :-1]
        return full_precision(last.boxes), scores * out.valid.unsqueeze(-1)

    def level_sizes(self, out: RoIOutput) -> tuple[int, ...]:
        return (out.proposals.shape[1],)
