"""YOLOX's post-processing against the reference vectors."""

from __future__ import annotations

import pytest
import torch

from tests.parity.vectors import Case, cases
from yoloxkd.ops.nms import postprocess


@pytest.mark.parametrize("case", cases("yolox", "post_"))
def test_detections_equal_the_reference(case: Case) -> None:
    pred = case.tensor("pred")
    center, size = pred[..., :2], pred[..., 2:4]
    boxes = torch.cat([center - size / 2, center + size / 2], dim=2)
    scores = pred[..., 4:5] * pred[..., 5:]

    found = postprocess(
        boxes,
        scores,
        conf=case.params["conf_thre"],
        iou=case.params["nms_thre"],
        max_det=pred.shape[1],
        agnostic=case.params["class_agnostic"],
    )

    det, image = case.tensor("det"), case.tensor("det_image")
    assert [len(s) for _, s, _ in found] == [int((image == i).sum()) for i in range(len(pred))]
    torch.testing.assert_close(torch.cat([b for b, _, _ in found]), det[:, :4], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([s for _, s, _ in found]), det[:, 4] * det[:, 5], rtol=1e-9, atol=1e-12)
    assert torch.equal(torch.cat([k for _, _, k in found]), det[:, 6].long())
