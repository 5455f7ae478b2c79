"""A detector in two stages is one type with the others: four verbs, heads for anybody's regions, NMS on its candidates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.exporters.tiny import TinyDetector
from yoloxkd.config.strict import Strict
from yoloxkd.engine.step import TrainStep
from yoloxkd.nn.assigners.match import Match
from yoloxkd.nn.detector import BoxCode, DetectorSpec
from yoloxkd.nn.two_stage.roi_detector import RoIDetector, RoIMatch
from yoloxkd.ops.boxes import pairwise_iou
from yoloxkd.ops.nms import NMS
from yoloxkd.types import Batch, Draw, Loss, Losses, RoIOutput, RoIStage, Tap, Targets, task_losses

PROPOSALS = 12


class TwoStages(RoIDetector):
    """The dense detector's best boxes as proposals, and one linear head on the mean of the neck's finest map inside each."""

    class Config(Strict):
        """Nothing to set."""

    family = "two-stages"

    def __init__(self, cfg: TwoStages.Config, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.rpn = TinyDetector(["object"])
        self.head = nn.Linear(16, len(names) + 1 + 4)
        self.spec = DetectorSpec(
            names=tuple(names),
            strides=self.rpn.spec.strides,
            channels={Tap.NECK: {8: 16, 16: 16}, Tap.ROI: {8: 16}},
            box_code=BoxCode("anchors"),
            input=self.rpn.spec.input,
            stable_locations=False,
        )

    def network(self, x: Tensor) -> RoIOutput:
        rpn = self.rpn.network(x)
        best = self.rpn.scores(rpn)[..., 0].topk(PROPOSALS, 1)
        boxes = rpn.boxes.gather(1, best.indices.unsqueeze(-1).expand(-1, -1, 4)).detach()
        return RoIOutput(rpn, boxes, best.values > 0, (self.roi(rpn.features, boxes),))

    def roi(self, features: tuple[Tensor, ...], boxes: Tensor, stage: int = 0) -> RoIStage:
        fine = features[0]
        at = torch.arange(fine.shape[2], device=fine.device) * 8 + 4.0
        columns = ((at > boxes[..., 0:1]) & (at < boxes[..., 2:3])).to(fine.dtype)
        rows = ((at > boxes[..., 1:2]) & (at < boxes[..., 3:4])).to(fine.dtype)
        pooled = torch.einsum("bchw,bph,bpw->bpc", fine, rows, columns)
        pooled = pooled / (rows.sum(-1) * columns.sum(-1)).clamp(min=1).unsqueeze(-1)
        said = self.head(pooled)
        code = said[..., -4:]
        return RoIStage(pooled[..., None, None], said[..., :-4], code, boxes + code)

    @torch.no_grad()
    def assign(self, out: RoIOutput, targets: Targets, draw: Draw = Draw()) -> RoIMatch:
        """Positives overlap a box by half; of all regions half are drawn."""
        overlap = (pairwise_iou(out.proposals, targets.boxes) * targets.mask.unsqueeze(1)).max(2)
        fg = overlap.values >= 0.5
        chance = torch.Generator().manual_seed(draw.seed * 1000 + draw.number)
        left_out = torch.rand(fg.shape, generator=chance) < 0.5
        match = Match(fg, torch.where(fg, overlap.indices, -1), left_out & ~fg)
        return RoIMatch(self.rpn.assign(out.rpn, targets, draw), (out.proposals,), (match,))

    def losses(self, out: RoIOutput, targets: Targets, match: RoIMatch) -> Losses:
        (of_stage,) = match.stages
        labels = targets.labels.gather(1, of_stage.gt.clamp(min=0))
        wanted = torch.where(of_stage.fg, labels, len(self.names))
        logits = out.stages[0].cls_logits
        each = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
        return self.rpn.losses(out.rpn, targets, match.rpn) | task_losses(
            **{"roi/cls": Loss(each.masked_fill(of_stage.ignored, 0).sum(), (~of_stage.ignored).sum())}
        )


def batch() -> Batch:
    torch.manual_seed(1)
    boxes = torch.tensor([[[4.0, 4.0, 40.0, 44.0], [20.0, 10.0, 60.0, 30.0]]]).repeat(2, 1, 1)
    mask = torch.ones(2, 2, dtype=torch.bool)
    targets = Targets(boxes, torch.tensor([[0, 1], [1, 0]]), mask, torch.zeros_like(mask))
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    return Batch(images, targets, torch.tensor([[0.0, 0.0, 64.0, 64.0]]).repeat(2, 1))


def model() -> TwoStages:
    torch.manual_seed(0)
    return TwoStages(TwoStages.Config(), ["cat", "dog"])


def test_a_step_samples_by_seed_and_number_alone() -> None:
    step, data = TrainStep(model(), nn.ModuleDict()), batch()

    def loss(*draw: int) -> float:
        torch.rand(3)
        return float(sum(value.mean() for value in step(data, Draw(*draw)).values()))

    assert loss(0, 7) == loss(0, 7)
    assert len({loss(0, 7), loss(0, 8), loss(1, 7)}) == 3


def test_losses_train_every_stage() -> None:
    detector = model()
    losses = TrainStep(detector, nn.ModuleDict())(batch())
    assert [str(name) for name in losses] == ["none", "roi/cls"]
    assert {name.source for name in losses} == {"task"}  # whatever a term is called
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    assert detector.head.weight.grad is not None
    assert detector.rpn.head.weight.grad is not None


def test_a_head_is_asked_about_anybodys_regions() -> None:
    detector, data = model().eval(), batch()
    with torch.no_grad():
        out = detector(data.images)
        again = detector.roi(out.features, out.proposals[:, :3])
    torch.testing.assert_close(again.cls_logits, out.stages[0].cls_logits[:, :3])
    assert out.features is out.rpn.features
    assert [m.shape for m in out.roi_features] == [(2, PROPOSALS, 16, 1, 1)]
    assert out.image_size == (64, 64)


def test_slots_without_a_proposal_are_never_detected() -> None:
    detector = model().eval()
    with torch.no_grad():
        out = detector(batch().images)
    out.valid[0, 1:] = False
    boxes, scores = detector.candidates(out)
    assert boxes.shape == (2, PROPOSALS, 4)
    assert scores.shape == (2, PROPOSALS, 2)
    assert float(scores[0, 1:].max()) == 0.0
    kinds = out.stages[0].cls_logits[0, 0].softmax(-1)[:2]
    torch.testing.assert_close(scores[0, 0], kinds)
    first, second = detector.detect(out, NMS(conf=1e-6, iou=1.0))
    assert (len(first), len(second)) == (1, PROPOSALS)
    assert first.names == ["cat", "dog"]
