"""Every detector in two stages keeps their contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.losses import task
from tests.nn.contract import NAMES, boxes_of, pictures
from tests.nn.two_stage.contract import TwoStageContract, narrow_two_stage, with_masks
from yoloxkd.nn.two_stage.cascade_rcnn import CascadeRCNN
from yoloxkd.nn.two_stage.faster_rcnn import FasterRCNN
from yoloxkd.nn.two_stage.mask_rcnn import CascadeMaskRCNN, MaskRCNN
from yoloxkd.ops.nms import NMS
from yoloxkd.types import ImageMeta, Targets


class TestFasterRCNN(TwoStageContract):
    kind = FasterRCNN


class TestCascadeRCNN(TwoStageContract):
    kind = CascadeRCNN


class MaskContract(TwoStageContract):
    """What masks add."""

    kind = MaskRCNN

    def mask_loss(self, targets: Targets) -> Tensor:
        """The sum of all stages'; the regions are those of any call."""
        losses = task(self.model, self.in_training(pictures(2, self.size, self.size)), targets)
        return torch.stack([value for name, value in losses.items() if name.endswith("/mask")]).sum()

    def test_an_object_without_a_mask_trains_its_box_alone(self) -> None:
        targets = with_masks(boxes_of(2, 3, self.size), self.size)
        assert targets.masks is not None
        whole = self.mask_loss(targets)
        targets.masks[:, 0] = False
        some = self.mask_loss(targets)
        assert some > 0
        assert some != whole
        targets.masks = None
        nothing = self.mask_loss(targets)
        assert nothing == 0
        nothing.backward()  # every parameter has its gradient, zero
        head = self.model.roi_head.get_submodule("mask_head")
        assert all(p.grad is not None and not p.grad.any() for p in head.parameters())

    def test_every_detection_has_a_mask_in_its_box(self) -> None:
        """In the stored image, whatever the size that the network saw it in."""
        meta = ImageMeta(0, "", 2 * self.size - 20, 2 * self.size, scale=0.5)
        first, nothing = self.model.detect(self.forward_with(valid=(True, False)), NMS(conf=1e-4, iou=0.7, max_det=7))
        assert (len(first), len(nothing)) == (7, 0)
        placed = first.to_image(meta)
        assert placed.masks is not None
        assert placed.masks.shape == (7, meta.height, meta.width)
        assert placed.soft_masks is None
        assert placed.masks.any()
        for box, mask in zip(placed.boxes, placed.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert not len(rows) or (columns.min() >= box[0] - 1 and rows.max() <= box[3] + 1)
        one = first[2].to_image(meta)
        assert one.masks is not None
        assert np.array_equal(one.masks[0], placed.masks[2])
        empty = nothing.to_image(meta).masks
        assert empty is not None
        assert empty.shape == (0, meta.height, meta.width)

    def forward_with(self, valid: tuple[bool, bool]) -> Any:
        out = self.forward(pictures(2, self.size, self.size))
        out.valid &= torch.tensor(valid).unsqueeze(1)
        return out


class TestMaskRCNN(MaskContract):
    kind = MaskRCNN


class TestCascadeMaskRCNN(MaskContract):
    kind = CascadeMaskRCNN


def test_a_box_detector_has_no_masks() -> None:
    model = narrow_two_stage(FasterRCNN, NAMES).eval()
    with torch.no_grad():
        (found,) = model.detect(model(pictures(1, 96, 96)), NMS(conf=1e-4, iou=0.7, max_det=7))
    assert not model.spec.masks
    assert found.soft_masks is None
