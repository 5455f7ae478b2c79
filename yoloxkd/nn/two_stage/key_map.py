"""Checkpoints of two-stage detectors by torchvision and mmdetection 2 and 3: recognized, and brought under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from yoloxkd.config.files import cfg_names
from yoloxkd.errors import UserError
from yoloxkd.nn.backbones.timm_backbone import create
from yoloxkd.nn.weights.load import rows
from yoloxkd.nn.weights.mmdet_weights import (
    MOBILE_LAST,
    OFFSETS,
    SHORT,
    DenseState,
    backbone_name,
    class_names,
    config_text,
    convention,
    deformable_stages,
    is_used_key,
    our_key,
)

NOT_COCO = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""Numbers up to 90 that no category of COCO has; torchvision's files have a row for each."""
COCO_IDS = 90
EXACT_NORMS = ("258fb6c6", "bf2d0c1e")
"""Beginnings of the digests of torchvision's published first versions, whose batch norms add nothing to their variances."""
COUNTER = ".num_batches_tracked"
COARSE, COARSE_LAST = "mobilenetv3_large_100", "blocks.6.0.conv.weight"
SMALL_INPUT = "907ea3f9"
"""Beginning of the digest of torchvision's published MobileNetV3 detector for images of 320 px."""
RPN_ANCHORS = {4: 3, 2: 15}
"""Levels with convolutions -> anchors of a cell: of the pyramid, and of `coarse`."""

_CLASSES, _BOXES = "roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.bbox_pred.weight"
_BLOCK = ("conv", "bn")
_TORCHVISION = (
    (r"roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.0.shared_fcs.0."),
    (r"roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.0.shared_fcs.1."),
    (r"roi_heads\.box_head\.5\.", "roi_head.bbox_head.0.shared_fcs.0."),
    (r"roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.0.fc_cls."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.0.fc_reg."),
    (r"roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.0.upsample."),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.0.conv_logits."),
    (r"rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
)
_TORCHVISION_BLOCKS = (
    (r"backbone\.fpn\.inner_blocks\.(\d+)\.(?:([01])\.)?", "neck.lateral_convs."),
    (r"backbone\.fpn\.layer_blocks\.(\d+)\.(?:([01])\.)?", "neck.fpn_convs."),
    (r"roi_heads\.box_head\.(\d)\.([01])\.", "roi_head.bbox_head.0.shared_convs."),
    (r"roi_heads\.mask_head\.(\d+)\.([01])\.", "roi_head.mask_head.0.convs."),
    (r"rpn\.head\.conv\.(\d+)\.([01])\.", "rpn_head.rpn_conv."),
)
"""Beginnings of keys: blocks of a convolution and a norm, numbered; `backbone.body.` is the same in both."""


def torchvision_two_stage(raw: Mapping[str, Any], digest: str = "") -> DenseState | None:
    """Recognize a Faster or Mask R-CNN of torchvision on a ResNet or MobileNetV3, bare or wrapped ({"model": ...}); None: it is none.

    The background class, the first there, comes last here. COCO's files have a row for each of the numbers 0 to 90; those
    of the 80 categories are kept. digest: the file's SHA-256.
    """
    tensors = raw.get("model", raw)
    if not isinstance(tensors, Mapping):
        return None
    state = {str(k).removeprefix("module."): v for k, v in tensors.items() if isinstance(v, Tensor)}
    if _CLASSES not in state or "rpn.head.cls_logits.weight" not in state:
        return None
    classes = rows(state, _CLASSES) - 1
    used = [i for i in range(1, classes + 1) if classes != COCO_IDS or i not in NOT_COCO]
    body = _mobilenet_names(state)
    out = {body.get(key) or torchvision_key(key): value for key, value in state.items()}
    for key, value in out.items():
        if key.startswith("roi_head.bbox_head.0.fc_cls."):
            out[key] = value[[*used, 0]]
        elif key.startswith("roi_head.bbox_head.0.fc_reg."):
            out[key] = value.unflatten(0, (-1, 4))[used].flatten(0, 1)
        elif key.startswith("roi_head.mask_head.0.conv_logits."):
            out[key] = value[used]
    _check_shape(out)
    for key in [
        key for key in out if key.endswith(".running_mean")
    ]:  # a frozen batch norm of torchvision counts nothing
        out.setdefault(key.replace(".running_mean", COUNTER), torch.tensor(0))
    return DenseState(_torchvision_section(out, digest), out, len(used), None)


def _mobilenet_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """torchvision's names of the tensors of a MobileNetV3-Large -> timm's, which has the same ones in the same order.

    Empty: the backbone is another.
    """
    prefix = "backbone.body."
    published_keys = [key for key in state if key.startswith(prefix)]
    if f"{prefix}16.0.weight" not in state:
        return {}
    with torch.device("meta"):
        tensors = create(COARSE).state_dict()
    counted = any(key.endswith(COUNTER) for key in published_keys)
    names = [key for key in tensors if counted or not key.endswith(COUNTER)]
    if [tensors[key].shape for key in names] != [state[key].shape for key in published_keys]:
        raise UserError("the checkpoint has a backbone other than ResNet and MobileNetV3-Large, which is not supported")
    return {key: prefix + name for key, name in zip(published_keys, names, strict=True)}


def torchvision_key(key: str) -> str:
    """torchvision's name of a tensor -> ours; a name without a counterpart comes back as it is."""
    key = re.sub(
        r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1", key
    )  # as the published first versions have it
    key = re.sub(r"^roi_heads\.mask_head\.mask_fcn(\d)\.", lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.0.", key)
    for pattern, prefix in _TORCHVISION:
        key, count = re.subn("^" + pattern, prefix, key)
        if count:
            return key
    for pattern, prefix in _TORCHVISION_BLOCKS:
        block = re.match(pattern, key)
        if block:
            return f"{prefix}{block[1]}.{_BLOCK[int(block[2] or 0)]}.{key[block.end() :]}"
    return key


def _torchvision_section(state: dict[str, Tensor], digest: str) -> dict[str, Any]:
    """The model's name and keys; a proposal network of one convolution gets its short name in `state`."""
    second = "neck.lateral_convs.0.bn.weight" in state
    masks = "roi_head.mask_head.0.conv_logits.weight" in state
    convs = _count(state, r"rpn_head\.rpn_conv\.\d+\.conv\.weight")
    if convs == 1:
        for leaf in ("weight", "bias"):
            state[f"rpn_head.rpn_conv.{leaf}"] = state.pop(f"rpn_head.rpn_conv.0.conv.{leaf}")
    section = {
        "name": f"{'mask' if masks else 'faster'}-rcnn-r50@torchvision{'-v2' if second else ''}",
        "channels": rows(state, "neck.lateral_convs.0.conv.weight"),
        "rpn_convs": convs,
        "head_norm": second,
        **_head_keys(state),
    }
    if f"backbone.body.{COARSE_LAST}" in state:
        if masks:
            raise UserError(
                "the checkpoint is a Mask R-CNN on MobileNetV3, which is not supported; use one on a ResNet, or a Faster R-CNN"
            )
        small = "-320" if digest.startswith(SMALL_INPUT) else ""
        return section | {"name": f"faster-rcnn-mobilenetv3@torchvision{small}"}
    section["backbone"] = backbone_name(
        {key.replace("backbone.body.", "backbone."): value for key, value in state.items()}
    )
    if not second:
        section["norm_eps"] = 0.0 if digest.startswith(EXACT_NORMS) else None
    return section


def mmdetection_two_stage(raw: Mapping[str, Any], file_name: str = "") -> DenseState | None:
    """Recognize a Faster, Cascade, Mask or Cascade Mask R-CNN of mmdetection 2 or 3, bare or wrapped; None: it is none.

    What weights do not tell is read from the configuration in the file, else from its name, else mmdetection's default.
    """
    tensors = raw.get("state_dict", raw)
    if not isinstance(tensors, Mapping):
        return None
    state = {str(k).removeprefix("module."): v for k, v in tensors.items() if isinstance(v, Tensor)}
    cascade = "roi_head.bbox_head.0.fc_cls.weight" in state
    if not (cascade or "roi_head.bbox_head.fc_cls.weight" in state) or "rpn_head.rpn_cls.weight" not in state:
        return None
    backbone, meta = backbone_name(state), raw.get("meta")
    deformable = deformable_stages(state)
    if any(key.endswith(".conv_offset.weight") and rows(state, key) != OFFSETS for key in state):
        raise UserError("the checkpoint's deformable convolutions are modulated or in groups, which is not supported")
    state = {mmdetection_key(our_key(k)): v for k, v in state.items() if is_used_key(k)}
    _check_shape(state)
    if cascade and (len(_stages(state)) != 3 or rows(state, "roi_head.bbox_head.0.fc_reg.weight") != 4):
        raise UserError(
            "the checkpoint's cascade has not three stages with a box for all classes alike; use one that has"
        )
    masks = "roi_head.mask_head.0.conv_logits.weight" in state
    family = ("cascade-" if cascade else "") + ("mask-" if masks else "" if cascade else "faster-") + "rcnn"
    name = f"{family}-{SHORT.get(backbone, 'r50')}"
    section: dict[str, Any] = {
        "name": name if name in cfg_names("models") else f"{family}-r50",
        "backbone": backbone,
        "channels": rows(state, "neck.lateral_convs.0.conv.weight"),
        "deformable_stages": deformable,
        **_head_keys(state),
        **convention(family, config_text(meta), file_name),
    }
    if backbone == "mobilenetv2_100":
        section["last_conv"] = rows(state, "neck.lateral_convs.3.conv.weight", 1) == MOBILE_LAST
        if not section["last_conv"]:
            state = {
                k: v for k, v in state.items() if not k.startswith(("backbone.body.conv_head.", "backbone.body.bn2."))
            }
    classes = rows(state, "roi_head.bbox_head.0.fc_cls.weight") - 1
    return DenseState(section, state, classes, class_names(meta, classes))


def mmdetection_key(key: str) -> str:
    """mmdetection's name of a tensor of the second stage -> ours: a single head is the first of a list here."""
    return re.sub(r"^roi_head\.(bbox|mask)_head\.(?!\d)", r"roi_head.\1_head.0.", key)


def _head_keys(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keys of the second stage: widths and numbers of layers."""
    first = "roi_head.bbox_head.0."
    keys: dict[str, Any] = {
        "hidden": rows(state, f"{first}fc_cls.weight", 1),
        "box_layers": _count(state, rf"{re.escape(first)}shared_fcs\.\d+\.weight"),
        "box_convs": _count(state, rf"{re.escape(first)}shared_convs\.\d+\.conv\.weight"),
    }
    if "roi_head.mask_head.0.conv_logits.weight" in state:
        keys["mask_hidden"] = rows(state, "roi_head.mask_head.0.conv_logits.weight", 1)
        keys["mask_convs"] = _count(state, r"roi_head\.mask_head\.0\.convs\.\d+\.conv\.weight")
    return keys


def _check_shape(state: Mapping[str, Tensor]) -> None:
    """UserError: parts that are not supported here."""
    levels = _count(state, r"neck\.fpn_convs\.\d+\.conv\.weight")
    anchors = rows(state, "rpn_head.rpn_cls.weight")
    if RPN_ANCHORS.get(levels) != anchors or (levels == 2) != (f"backbone.body.{COARSE_LAST}" in state):
        raise UserError(
            f"the checkpoint's R-CNN has {levels} levels with convolutions and {anchors} anchors a cell, which is not supported; "
            f"use one on strides 4, 8, 16 and 32 with {RPN_ANCHORS[4]} anchors, or torchvision's on MobileNetV3"
        )


def _stages(state: Mapping[str, Tensor]) -> set[str]:
    return {key.split(".")[2] for key in state if key.startswith("roi_head.bbox_head.")}


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(bool(re.fullmatch(pattern, key)) for key in state)
