"""Names of a two-stage detector's tensors in the files of torchvision and mmdetection, and what their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from yoloxkd.nn.weights.load import rows

NOT_COCO = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""Numbers up to 90 that no category of COCO has; torchvision's files have a row for each."""

_TORCHVISION = (
    (r"backbone\.fpn\.inner_blocks\.(\d+)\.(?:0\.)?", r"neck.lateral_convs.\1.conv."),
    (r"backbone\.fpn\.layer_blocks\.(\d+)\.(?:0\.)?", r"neck.fpn_convs.\1.conv."),
    (r"rpn\.head\.conv\.(?:0\.0\.)?", "rpn_head.rpn_conv."),
    (r"rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.0.shared_fcs.0."),
    (r"roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.0.shared_fcs.1."),
    (r"roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.0.fc_cls."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.0.fc_reg."),
)
"""Beginnings of torchvision's keys -> ours; `backbone.body.` is the same in both."""


def is_torchvision(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of one of torchvision's Faster R-CNNs on an FPN."""
    return {"roi_heads.box_predictor.cls_score.weight", "roi_heads.box_head.fc6.weight"} <= state.keys()


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's tensors under our names; the background class, the first there, comes last here.

    COCO's files have a row for each of the numbers 0 to 90; those of the 80 categories are kept.
    """
    classes = rows(state, "roi_heads.box_predictor.cls_score.weight") - 1
    kept = [i for i in range(1, classes + 1) if classes != 90 or i not in NOT_COCO]
    out = {}
    for key, tensor in state.items():
        name = _renamed(key, _TORCHVISION)
        if name.startswith("roi_head.bbox_head.0.fc_cls."):
            tensor = tensor[[*kept, 0]]
        elif name.startswith("roi_head.bbox_head.0.fc_reg."):
            tensor = tensor.unflatten(0, (-1, 4))[kept].flatten(0, 1)
        out[name] = tensor
    return out


def torchvision_keys(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keys of `FasterRCNN.Config` by which it computes what torchvision's does."""
    return {
        "channels": rows(state, "rpn.head.cls_logits.weight", 1),
        "hidden": rows(state, "roi_heads.box_head.fc6.weight"),
        "train_proposals": 2000,
        "roi_sampling": 2,
        "roi_aligned": False,
        "rounded_anchors": True,
    }


def is_mmdetection(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of one of mmdetection's R-CNNs on an FPN."""
    heads = ("roi_head.bbox_head.fc_cls.weight", "roi_head.bbox_head.0.fc_cls.weight")
    return any(head in state for head in heads) and "rpn_head.rpn_conv.weight" in state


def from_mmdetection(key: str) -> str:
    """mmdetection's name of a tensor of the second stage -> ours: a single head is the first of a list here."""
    return re.sub(r"^roi_head\.(bbox|mask)_head\.(?!\d)", r"roi_head.\1_head.0.", key)


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in rules:
        key, count = re.subn("^" + pattern, ours, key)
        if count:
            break
    return key


def without_eps(state: Mapping[str, Tensor], eps: float = 1e-5) -> dict[str, Tensor]:
    """Variances less the `eps` that our norms add to them, for files whose norms add nothing."""
    return {k: v - eps if k.endswith("running_var") and torch.is_floating_point(v) else v for k, v in state.items()}
