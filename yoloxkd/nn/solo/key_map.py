"""mmdetection's SOLO checkpoints: recognized, and brought under our names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from yoloxkd.config.files import cfg_names
from yoloxkd.errors import UserError
from yoloxkd.nn.weights.load import rows
from yoloxkd.nn.weights.mmdet_weights import (
    MOBILE_LAST,
    SHORT,
    DenseState,
    backbone_name,
    class_names,
    config_text,
    convention,
    deformable_stages,
    groups_of,
    is_used_key,
    our_key,
)

LEVELS = 5


def mmdetection_solo(raw: Mapping[str, Any], file_name: str = "") -> DenseState | None:
    """Recognize a SOLO of mmdetection, bare or wrapped; None: it is none. UserError: its head is decoupled."""
    tensors = raw.get("state_dict", raw)
    if not isinstance(tensors, Mapping):
        return None
    state = {str(k).removeprefix("module."): v for k, v in tensors.items() if isinstance(v, Tensor)}
    if any(key.startswith("mask_head.conv_mask_list_x.") for key in state):
        raise UserError("the checkpoint is of a decoupled SOLO, which is not supported; use one of the plain head")
    if "mask_head.conv_mask_list.0.weight" not in state:
        return None
    grids = [math.isqrt(rows(state, f"mask_head.conv_mask_list.{level}.weight")) for level in range(LEVELS)]
    backbone, meta = backbone_name(state), raw.get("meta")
    name, text = f"solo-{SHORT.get(backbone, 'r50')}", config_text(meta)
    section: dict[str, Any] = {
        "name": name if name in cfg_names("models") else "solo-r50",
        "backbone": backbone,
        "channels": rows(state, "neck.lateral_convs.0.conv.weight"),
        "hidden": rows(state, "mask_head.conv_cls.weight", 1),
        "stacked_convs": sum(bool(re.fullmatch(r"mask_head\.cls_convs\.\d+\.conv\.weight", key)) for key in state),
        "groups": groups_of(text),
        "grids": grids,
        "deformable_stages": deformable_stages(state),
        **convention("solo", text, file_name),
    }
    if backbone == "mobilenetv2_100":
        section["last_conv"] = rows(state, "neck.lateral_convs.3.conv.weight", 1) == MOBILE_LAST
    classes = rows(state, "mask_head.conv_cls.weight")
    return DenseState(
        section, {our_key(k): v for k, v in state.items() if is_used_key(k)}, classes, class_names(meta, classes)
    )
