"""torchvision's Faster R-CNN with its weights under our names detects the same."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from yoloxkd.nn.two_stage.faster_rcnn import FasterRCNN
from yoloxkd.nn.two_stage.key_map import NOT_COCO, from_mmdetection, from_torchvision, is_torchvision, torchvision_keys
from yoloxkd.ops.nms import NMS

HEIGHT, WIDTH = 128, 160
NAMES = ["cat", "dog", "bird"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.slow
def test_it_detects_what_torchvision_detects() -> None:
    """Random weights; the pictures have a size that torchvision's own preparation leaves alone."""
    torch.manual_seed(0)
    reference = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=len(NAMES) + 1, min_size=HEIGHT, max_size=WIDTH,
        rpn_post_nms_top_n_test=60,
    ).double()  # fmt: skip
    images = torch.rand(2, 3, HEIGHT, WIDTH, dtype=torch.float64)
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    prepared = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        reference.backbone.train()(prepared)  # norms with statistics of their own, or the maps grow without bound
        reference.eval()
        reference.rpn.head.cls_logits.weight *= 5  # logits of an untrained network hardly differ
        reference.roi_heads.box_predictor.cls_score.weight *= 10
        reference.roi_heads.box_predictor.bbox_pred.weight *= 4
    state = reference.state_dict()
    assert is_torchvision(state)
    keys = {"backbone": "resnet50", "frozen_stages": 1, "norm_eval": True} | torchvision_keys(state)
    cfg = FasterRCNN.Config(**keys, test_proposals=60)
    model = FasterRCNN(cfg, NAMES).double().eval()
    model.load_state_dict(from_torchvision(state))

    with torch.no_grad():
        expected = reference(list(images))
        found = model.detect(model(images * 255), NMS(conf=0.05, iou=0.5, max_det=100))
    for ours, reference_image in zip(found, expected, strict=True):
        assert len(ours.boxes) == len(reference_image["boxes"]) > 20
        assert len(set(ours.labels.tolist())) > 1
        torch.testing.assert_close(torch.from_numpy(ours.boxes), reference_image["boxes"].float(), rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(ours.scores), reference_image["scores"].float(), rtol=1e-5, atol=0)
        assert (ours.labels == (reference_image["labels"] - 1).numpy()).all()


def test_a_coco_file_keeps_the_rows_of_its_80_categories() -> None:
    state = {
        "roi_heads.box_predictor.cls_score.weight": torch.arange(91.0)[:, None],
        "roi_heads.box_predictor.bbox_pred.bias": torch.arange(91.0).repeat_interleave(4),
        "roi_heads.box_head.fc6.weight": torch.zeros(4, 4),
    }
    found = from_torchvision(state)
    numbers = [i for i in range(1, 91) if i not in NOT_COCO]
    assert len(numbers) == 80
    assert found["roi_head.bbox_head.0.fc_cls.weight"][:, 0].tolist() == [*numbers, 0]
    assert found["roi_head.bbox_head.0.fc_reg.bias"].view(-1, 4)[:, 3].tolist() == numbers


def test_keys_of_mmdetection() -> None:
    pairs = {
        "roi_head.bbox_head.shared_fcs.0.weight": "roi_head.bbox_head.0.shared_fcs.0.weight",
        "roi_head.bbox_head.2.fc_cls.bias": "roi_head.bbox_head.2.fc_cls.bias",
        "roi_head.mask_head.convs.1.conv.weight": "roi_head.mask_head.0.convs.1.conv.weight",
        "rpn_head.rpn_reg.weight": "rpn_head.rpn_reg.weight",
    }
    assert {key: from_mmdetection(key) for key in pairs} == pairs
