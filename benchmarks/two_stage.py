"""A training step of Faster and Mask R-CNN against torchvision's, time and memory, from the same weights, on the same batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from benchmarks.peak_memory import high_water
from benchmarks.report import Row, run_script
from benchmarks.scenes import batch_of
from benchmarks.steps_of import training_step
from benchmarks.timing import Spread, alternate, ratio
from yoloxkd.assembly.models import parse_student
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.two_stage.key_map import torchvision_two_stage
from yoloxkd.types import Batch

KINDS = {"faster-rcnn": detection.FasterRCNN, "mask-rcnn": detection.MaskRCNN}


def torchvision_model(kind: str, backbone: str, classes: int, size: int) -> Any:
    """torchvision's detector with random weights, everything trainable, which leaves images of `size` px as they are."""
    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)
    return KINDS[kind](body, classes + 1, min_size=size, max_size=size).train()


def torchvision_step(model: Any, batch: Batch) -> Callable[[], Tensor]:
    """Forward, losses, backward and the optimizer's step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, nesterov=True, weight_decay=5e-4)
    images, targets = list(batch.images.float() / 255), batch.targets
    assert targets.masks is not None
    truth = [
        {"boxes": boxes[real], "labels": labels[real] + 1, "masks": masks[real].to(torch.uint8)}
        for boxes, labels, masks, real in zip(targets.boxes, targets.labels, targets.masks, targets.mask, strict=True)
    ]

    def run() -> Tensor:
        losses = model(images, truth)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        return total.detach()

    return run


def with_weights_of(model: Any) -> Detector[Any, Any]:
    """Ours, with torchvision's weights."""
    found = torchvision_two_stage(model.state_dict())
    assert found is not None
    free = {"frozen_stages": 0, "norm_eval": False, "norm_frozen": False, "backbone_weights": "none"}
    student = parse_student(found.section | free)
    detector = DETECTORS[found.section["name"].partition("-r50")[0]](
        student.config, [str(i) for i in range(found.classes)]
    )
    detector.load_state_dict(found.state)
    return detector


def masked_batch(images: int, boxes: int, size: int, classes: int) -> Batch:
    """A batch whose masks are the boxes."""
    batch = batch_of(images, boxes, size, classes=classes)
    at = torch.arange(size) + 0.5
    x1, y1, x2, y2 = (side[..., None] for side in batch.targets.boxes.unbind(-1))
    batch.targets.masks = ((at > y1) & (at < y2)).unsqueeze(-1) & ((at > x1) & (at < x2)).unsqueeze(-2)
    return batch


def measure(quick: bool) -> Iterator[Row]:
    backbone, images, size, boxes, rounds = ("resnet18", 1, 64, 2, 1) if quick else ("resnet50", 2, 320, 8, 4)
    classes = 80
    batch = masked_batch(images, boxes, size, classes)
    for kind in KINDS:
        reference = torchvision_model(kind, backbone, classes, size)
        model = with_weights_of(reference)
        same_maps(reference, model, batch.images)
        turns: dict[str, Callable[[], object]] = {
            "torchvision": torchvision_step(reference, batch), "ours": training_step(model, batch)
        }  # fmt: skip
        samples = alternate(turns, rounds, warmup=0 if quick else 1)
        yield Row(
            f"torchvision's step / ours, {kind} on {backbone}, {size} px, {images} images × {boxes} boxes",
            *ratio(samples["torchvision"], samples["ours"]),
            at_least=1.0,
            note=f"{samples['torchvision'].milliseconds} / {samples['ours'].milliseconds}; same weights and maps, each "
            "samples its own regions",
        )
        theirs, ours = (high_water(turns[name]) for name in ("torchvision", "ours"))
        yield Row(
            f"memory of our step over torchvision's, {kind}, the same",
            Spread(ours / theirs, ours / theirs, ours / theirs),
            at_most=1.1,
            note=f"{ours:.0f} / {theirs:.0f} MiB of live tensors at the peak, over weights and optimizer",
        )


@torch.no_grad()
def same_maps(reference: Any, model: Detector[Any, Any], images: Tensor) -> None:
    """Both networks say the same of the anchors."""
    prepared, _ = reference.eval().transform(list(images.float() / 255))
    logits, _ = reference.rpn.head(list(reference.backbone(prepared.tensors).values()))
    theirs = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in logits], 1)
    ours = model.eval()(images).rpn.cls_logits.squeeze(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    reference.train()


if __name__ == "__main__":
    run_script("two_stage", "A training step of R-CNNs against torchvision's", measure)
