"""torchvision's FCOS checkpoints: recognized by their keys, brought under our names.

What differs from the published FCOS lies in the keys of the model `fcos-r50@torchvision`: points at the cells' corners, no
learned factor of a level, the square root of class times center-ness as score.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.nn.weights.load import rows
from yoloxkd.nn.weights.mmdet_weights import RESNETS, DenseState

COCO_ROWS = 91
"""Outputs of its COCO files: a category id is a row, 0 the background."""
UNUSED_ROWS = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""Ids that no category of COCO has."""

TOWERS = {"classification_head": "cls_convs", "regression_head": "reg_convs"}

_NECK = (
    (r"backbone\.fpn\.inner_blocks\.(\d+)\.(?:0\.)?(weight|bias)", r"neck.lateral_convs.\1.conv.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d+)\.(?:0\.)?(weight|bias)", r"neck.fpn_convs.\1.conv.\2"),
    (r"backbone\.fpn\.extra_blocks\.p6\.(\w+)", r"neck.fpn_convs.3.conv.\1"),
    (r"backbone\.fpn\.extra_blocks\.p7\.(\w+)", r"neck.fpn_convs.4.conv.\1"),
)
_PREDICTORS = (
    (r"head\.classification_head\.cls_logits\.(\w+)", r"head.conv_cls.\1"),
    (r"head\.regression_head\.bbox_reg\.(\w+)", r"head.conv_reg.\1"),
    (r"head\.regression_head\.bbox_ctrness\.(\w+)", r"head.conv_centerness.\1"),
)


def torchvision_state(raw: Mapping[str, Any]) -> DenseState | None:
    """Recognize a checkpoint, bare or wrapped ({"model": ...}, as torchvision's reference scripts write); None: it is none.

    raw as from `load.load_checkpoint_file`. The unused ids of a COCO file are left out, so that its classes are COCO's 80.
    UserError: such a detector on a backbone that is not supported here.
    """
    tensors = raw.get("model", raw)
    if not isinstance(tensors, Mapping):
        return None
    state = {str(k).removeprefix("module."): v for k, v in tensors.items() if isinstance(v, Tensor)}
    predictor = "head.classification_head.cls_logits.weight"
    if predictor not in state or "head.regression_head.bbox_ctrness.weight" not in state:
        return None
    section = {
        "name": "fcos-r50@torchvision",
        "backbone": _backbone(state),
        "channels": rows(state, predictor, 1),
        "stacked_convs": sum(bool(re.fullmatch(r"head\.regression_head\.conv\.\d+\.weight", k)) for k in state) // 2,
    }
    classes = rows(state, predictor)
    found = {our_key(key): value for key, value in state.items()}
    if classes == COCO_ROWS:
        used = [row for row in range(COCO_ROWS) if row not in UNUSED_ROWS]
        for leaf in ("weight", "bias"):
            found[f"head.conv_cls.{leaf}"] = found[f"head.conv_cls.{leaf}"][used]
        classes = len(used)
    counts = {key.replace("running_mean", "num_batches_tracked"): 0 for key in found if key.endswith("running_mean")}
    for key, count in counts.items():  # a frozen batch norm of torchvision has none
        found.setdefault(key, torch.tensor(count))
    return DenseState(section, found, classes, None)


def our_key(key: str) -> str:
    """torchvision's name of a tensor -> ours; a name without a counterpart comes back as it is."""
    for theirs, ours in _PREDICTORS:
        if re.fullmatch(theirs, key):
            return re.sub(theirs, ours, key)
    tower = re.fullmatch(r"head\.(classification_head|regression_head)\.conv\.(\d+)\.(\w+)", key)
    if tower:  # convolution, norm and activation, one after the other
        block, layer = divmod(int(tower[2]), 3)
        return f"head.{TOWERS[tower[1]]}.{block}.{('conv', 'gn', 'act')[layer]}.{tower[3]}"
    return neck_key(key)


def neck_key(key: str) -> str:
    """torchvision's name of a tensor of the FPN or the backbone -> ours; the backbone's names are alike."""
    for theirs, ours in _NECK:
        if re.fullmatch(theirs, key):
            return re.sub(theirs, ours, key)
    return key


def _backbone(state: Mapping[str, Tensor]) -> str:
    blocks = len({key.split(".")[3] for key in state if key.startswith("backbone.body.layer3.")})
    name = RESNETS.get((blocks, "backbone.body.layer3.0.conv3.weight" in state))
    if name is None or rows(state, "backbone.body.layer1.0.conv1.weight") != 64:
        raise UserError("the checkpoint of torchvision has a backbone other than ResNet, which is not supported")
    return name
