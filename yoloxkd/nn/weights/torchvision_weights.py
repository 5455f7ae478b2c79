"""torchvision's FCOS and RetinaNet checkpoints: recognized by their keys, brought under our names.

What differs from the published detectors lies in the keys of the models `fcos-r50@torchvision`, `retinanet-r50@torchvision` and
`retinanet-r50@torchvision-v2`: where points and anchors lie, the score, the batch norms, what the FPN's extra levels read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.nn.weights.load import rows
from yoloxkd.nn.weights.mmdet_weights import ANCHORS, RESNETS, DenseState
from yoloxkd.nn.weights.published import PUBLISHED

COCO_ROWS = 91
"""Classes of its COCO files: a category id is a row, 0 the background."""
UNUSED_ROWS = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""Ids that no category of COCO has."""

CLASSIFIER = "head.classification_head.cls_logits.weight"
BOXES = "head.regression_head.bbox_reg.weight"
CENTERNESS = "head.regression_head.bbox_ctrness.weight"

TOWERS = {"classification_head": "cls_convs", "regression_head": "reg_convs"}

_NECK = (
    (r"backbone\.fpn\.inner_blocks\.(\d+)\.(?:0\.)?(weight|bias)", r"neck.lateral_convs.\1.conv.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d+)\.(?:0\.)?(weight|bias)", r"neck.fpn_convs.\1.conv.\2"),
    (r"backbone\.fpn\.extra_blocks\.p6\.(\w+)", r"neck.fpn_convs.3.conv.\1"),
    (r"backbone\.fpn\.extra_blocks\.p7\.(\w+)", r"neck.fpn_convs.4.conv.\1"),
)
_PREDICTORS = {
    "fcos": {"cls_logits": "conv_cls", "bbox_reg": "conv_reg", "bbox_ctrness": "conv_centerness"},
    "retinanet": {"cls_logits": "retina_cls", "bbox_reg": "retina_reg"},
}


def torchvision_state(raw: Mapping[str, Any], digest: str = "") -> DenseState | None:
    """Recognize a checkpoint, bare or wrapped ({"model": ...}, as torchvision's reference scripts write); None: it is none.

    raw as from `load.load_checkpoint_file`; digest: the file's SHA-256, which tells the published RetinaNet, whose batch norms
    have an eps of 0. The unused ids of a COCO file are left out, so that its classes are COCO's 80.
    UserError: such a detector on a backbone, or with anchors, that are not supported here.
    """
    tensors = raw.get("model", raw)
    if not isinstance(tensors, Mapping):
        return None
    state = {str(k).removeprefix("module."): v for k, v in tensors.items() if isinstance(v, Tensor)}
    if CLASSIFIER not in state or BOXES not in state:
        return None
    family = "fcos" if CENTERNESS in state else "retinanet"
    section = {"backbone": _backbone(state), "channels": rows(state, CLASSIFIER, 1), "stacked_convs": _blocks(state)}
    section |= {"name": "fcos-r50@torchvision"} if family == "fcos" else _of_retinanet(state, digest)
    our_state = {our_key(key, family): value for key, value in state.items()}
    per_cell = 1 if family == "fcos" else ANCHORS
    classes = rows(state, CLASSIFIER) // per_cell
    if classes == COCO_ROWS:
        used = [row for row in range(COCO_ROWS) if row not in UNUSED_ROWS]
        for leaf in ("weight", "bias"):
            key = f"head.{_PREDICTORS[family]['cls_logits']}.{leaf}"
            our_state[key] = our_state[key].unflatten(0, (per_cell, COCO_ROWS))[:, used].flatten(0, 1)
        classes = len(used)
    counts = {
        key.replace("running_mean", "num_batches_tracked"): 0 for key in our_state if key.endswith("running_mean")
    }
    for key, count in counts.items():  # a frozen batch norm of torchvision has none
        our_state.setdefault(key, torch.tensor(count))
    return DenseState(section, our_state, classes, None)


def our_key(key: str, family: str) -> str:
    """torchvision's name of a tensor of FCOS or RetinaNet -> ours; a name without a counterpart comes back as it is.

    RetinaNet's towers come in three layouts: a convolution each, numbered 0, 2, 4, 6 (the published first version) or 0.0, 1.0,
    2.0, 3.0 (what torchvision makes of these today), and with group norms (0.0 the convolution, 0.1 the norm).
    """
    predictor = re.fullmatch(r"head\.(?:classification|regression)_head\.(\w+)\.(\w+)", key)
    if predictor and predictor[1] in _PREDICTORS[family]:
        return f"head.{_PREDICTORS[family][predictor[1]]}.{predictor[2]}"
    tower = re.fullmatch(r"head\.(classification_head|regression_head)\.conv\.(\d+)\.(?:([01])\.)?(\w+)", key)
    if tower is None:
        return neck_key(key)
    block, layer = int(tower[2]), 0 if tower[3] is None else int(tower[3])
    if tower[3] is None:  # convolution, norm (FCOS) and activation, one after the other
        block, layer = divmod(block, 3 if family == "fcos" else 2)
    return f"head.{TOWERS[tower[1]]}.{block}.{('conv', 'gn', 'act')[layer]}.{tower[4]}"


def neck_key(key: str) -> str:
    """torchvision's name of a tensor of the FPN or the backbone -> ours; the backbone's names are alike."""
    for pattern, replacement in _NECK:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, replacement, key)
    return key


def _of_retinanet(state: Mapping[str, Tensor], digest: str) -> dict[str, Any]:
    """What is RetinaNet's own of a section. UserError: other anchors."""
    logits, code = rows(state, CLASSIFIER), rows(state, BOXES)
    if code != 4 * ANCHORS or logits % ANCHORS:
        raise UserError(
            f"the checkpoint's RetinaNet predicts {code} box numbers and {logits} class logits a cell, which are not those "
            f"of {ANCHORS} anchors; use one with three sizes and three ratios"
        )
    if "head.classification_head.conv.0.1.weight" in state:
        section: dict[str, Any] = {"name": "retinanet-r50@torchvision-v2"}
    else:
        digest_start = PUBLISHED["retinanet-r50@torchvision"].sha256
        published = bool(digest_start and digest.startswith(digest_start))
        section = {"name": "retinanet-r50@torchvision"} | ({} if published else {"norm_eps": None})
    extra = rows(state, "backbone.fpn.extra_blocks.p6.weight", 1)
    section["extra_on"] = "output" if extra == rows(state, CLASSIFIER, 1) else "input"
    return section


def _blocks(state: Mapping[str, Tensor]) -> int:
    """Convolutions of a tower."""
    layers = [v for k, v in state.items() if re.fullmatch(r"head\.regression_head\.conv\.[\d.]+\.weight", k)]
    return sum(layer.ndim == 4 for layer in layers)


def _backbone(state: Mapping[str, Tensor]) -> str:
    blocks = len({key.split(".")[3] for key in state if key.startswith("backbone.body.layer3.")})
    name = RESNETS.get((blocks, "backbone.body.layer3.0.conv3.weight" in state))
    if name is None or rows(state, "backbone.body.layer1.0.conv1.weight") != 64:
        raise UserError("the checkpoint of torchvision has a backbone other than ResNet, which is not supported")
    return name
