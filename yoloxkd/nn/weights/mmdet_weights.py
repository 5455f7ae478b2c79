"""Key maps of mmdetection 2 and 3 checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from yoloxkd.config.files import cfg_names
from yoloxkd.errors import UserError
from yoloxkd.nn.weights.load import rows
from yoloxkd.nn.weights.mmdet_files import ZOO

FAMILIES = {
    "gfl": "gfl_cls",
    "atss": "atss_cls",
    "ddod": "atss_cls",
    "reppoints": "reppoints_cls_out",
    "retinanet": "retina_cls",
    "fcos": "conv_cls",
    "autoassign": "conv_cls",
}
"""Family -> the head's class predictor, which tells it; AutoAssign is told from FCOS by its center prior, DDOD from ATSS by
its deformable towers."""
RESNETS = {
    (2, False): "resnet18",
    (6, False): "resnet34",
    (6, True): "resnet50",
    (23, True): "resnet101",
    (36, True): "resnet152",
}
"""(blocks of the third stage, bottlenecks) -> timm's name."""
RESNEXTS = {
    (6, 128, 4): "resnext50_32x4d",
    (23, 128, 4): "resnext101_32x4d",
    (23, 256, 4): "resnext101_64x4d",
    (23, 256, 8): "resnext101_32x8d",
}
"""(blocks of the third stage, channels of the first 3x3 convolution, those that one of them reads) -> timm's name."""
SHORT = {
    "resnet50": "r50",
    "resnet101": "r101",
    "resnext101_32x4d": "x101-32x4d",
    "resnext101_64x4d": "x101-64x4d",
    "mobilenetv2_100": "mobilenetv2",
}
"""timm's name -> its part of our model names; other backbones go under the r50 model with their own `backbone`."""

DETECTRON_MEAN = (102.9801, 115.9465, 122.7717)
CAFFE_MEAN = (103.53, 116.28, 123.675)
"""BGR means of mmdetection's caffe-style configurations: FCOS as first published and AutoAssign have the former, all others
the latter."""
GROUPS = 32
"""Of the towers' group norms in every configuration of mmdetection; a user's own says it, the weights do not."""
ANCHORS = 9
"""RetinaNet's in a cell."""
OFFSETS = 18
"""Channels of what predicts the offsets of a 3x3 convolution: y and x of each kernel cell."""
MOBILE_LAST = 1280
"""Channels behind the last convolution of a MobileNetV2."""

_OTHER_NAMES = {
    "fcos_cls": "conv_cls",
    "fcos_reg": "conv_reg",
    "fcos_centerness": "conv_centerness",
    "atss_iou": "atss_centerness",
}
"""Those of mmdetection 1 and early 2, and of the ATSS in the release of PGD -> those of today."""
_BACKBONE_DEFORMABLE = re.compile(r"backbone\.layer[2-4]\.\d+\.conv2")
_DEFORMABLE = {"ddod": re.compile(_BACKBONE_DEFORMABLE.pattern + r"|bbox_head\.(cls|reg)_convs\.0\.conv")}
"""Where deformable convolutions that predict their own offsets are."""
_MOBILE_BLOCK = {
    "expand_conv.conv": "conv_pw",
    "expand_conv.bn": "bn1",
    "depthwise_conv.conv": "conv_dw",
    "depthwise_conv.bn": "bn2",
    "linear_conv.conv": "conv_pwl",
    "linear_conv.bn": "bn3",
}
_MOBILE_ENDS = {"conv1.conv.": "conv_stem.", "conv1.bn.": "bn1.", "conv2.conv.": "conv_head.", "conv2.bn.": "bn2."}
"""The first and the last convolution; a ResNet's are called `conv1.weight` and `bn1.weight`."""
_MOBILE_FIRST = {
    "depthwise_conv.conv": "conv_dw",
    "depthwise_conv.bn": "bn1",
    "linear_conv.conv": "conv_pw",
    "linear_conv.bn": "bn2",
}


@dataclass(slots=True)
class DenseState:
    """The weights of a checkpoint under our names.

    section  the model ({name, further keys of its Config})
    state    {key of the detector's state_dict(): tensor}
    classes  how many it predicts; names: what they are called, where the file says so
    """

    section: dict[str, Any]
    state: dict[str, Tensor]
    classes: int
    names: list[str] | None


def dense_state(raw: Mapping[str, Any], file_name: str = "") -> DenseState | None:
    """Recognize a checkpoint, bare or wrapped ({"state_dict": ...}); None when it is of no such detector.

    raw as from `weights.load_checkpoint_file`. What weights do not tell (the color order, the ResNet's style, FCOS's
    variants) is looked up in the table of published files by the file's name, else read from the configuration inside
    the file, else from the name as mmdetection's model zoo writes them, else taken to be mmdetection's default.
    UserError: such a detector with parts that are not supported here.
    """
    tensors = raw.get("state_dict", raw)
    if not isinstance(tensors, Mapping):
        return None
    state = {str(k).removeprefix("module."): v for k, v in tensors.items() if isinstance(v, Tensor)}
    overlap = "bbox_head.atss_iou.weight" in state
    disentangled = overlap and "bbox_head.cls_convs.0.conv.conv_offset.weight" in state
    if not disentangled:
        state = {_current(k): v for k, v in state.items()}
    state = {k.replace(".conv2_offset.", ".conv2.conv_offset."): v for k, v in state.items()}  # version 1
    state = {k: v for k, v in state.items() if not k.startswith("ema_")}
    family = next((f for f, key in FAMILIES.items() if f"bbox_head.{key}.weight" in state), None)
    if "bbox_head.center_prior.mean" in state:
        family = "autoassign"
    if disentangled:
        family = "ddod"
    if family is None or "neck.lateral_convs.0.conv.weight" not in state:
        return None
    _check_supported(family, state)
    meta = raw.get("meta")
    section = _section(family, state, config_text(meta), file_name)
    if family == "atss":
        section["quality"] = "iou" if overlap else "centerness"
    if not section.get("last_conv", True):  # mmdetection builds and keeps that layer even where no level reads it
        state = {k: v for k, v in state.items() if not k.startswith("backbone.conv2.")}
    classes = _classes(family, state)
    return DenseState(
        section, {our_key(k): v for k, v in state.items() if is_used_key(k)}, classes, class_names(meta, classes)
    )


def _section(family: str, state: Mapping[str, Tensor], text: str, file_name: str) -> dict[str, Any]:
    """The model's name and keys: what the weights tell, then what only the table, the configuration or the name does."""
    backbone = backbone_name(state)
    name = f"{family}-{SHORT.get(backbone, 'r50')}"
    tower = [k for k in state if re.fullmatch(r"bbox_head\.cls_convs\.\d+\.conv\.weight", k)]
    section: dict[str, Any] = {
        "name": name if name in cfg_names("models") else f"{family}-r50",
        "backbone": backbone,
        "channels": rows(state, "neck.lateral_convs.0.conv.weight"),
        "stacked_convs": len(tower),
        "groups": groups_of(text) if "bbox_head.cls_convs.0.gn.weight" in state else None,
        "deformable_stages": deformable_stages(state),
    }
    if backbone == "mobilenetv2_100":
        section["last_conv"] = rows(state, "neck.lateral_convs.2.conv.weight", 1) == MOBILE_LAST
    if family == "gfl":
        section["reg_max"] = rows(state, "bbox_head.gfl_reg.weight") // 4 - 1
    if family == "retinanet":
        from_input = rows(state, "neck.fpn_convs.3.conv.weight", 1) == rows(
            state, "neck.lateral_convs.2.conv.weight", 1
        )
        section["extra_on"] = "input" if from_input else "output"
    file_name = file_name.replace("%2B", "+")  # as the server writes some names
    if file_name in ZOO:
        return section | ZOO[file_name].keys
    variant = _fcos_variant(state, text, file_name) if family == "fcos" else {}
    if family == "retinanet":
        variant["relu_before_last"] = _relu_before_last(text)
    return section | convention(family, text, file_name) | variant


def deformable_stages(state: Mapping[str, Tensor]) -> int:
    """How many of a ResNet's stages, from the coarsest, have deformable convolutions."""
    stages = {int(k.split(".")[1].removeprefix("layer")) for k in state if re.match(r"backbone\..*\.conv_offset\.", k)}
    if stages and sorted(stages) != list(range(min(stages), 5)):
        raise UserError(
            f"the checkpoint's backbone has deformable convolutions in stages {sorted(stages)} alone, which is not supported; "
            "use one that has them up to its last stage, 4"
        )
    return len(stages)


def groups_of(text: str) -> int:
    setting = re.search(r"num_groups\s*=\s*(\d+)", text)
    return int(setting[1]) if setting else GROUPS


def _classes(family: str, state: Mapping[str, Tensor]) -> int:
    """How many classes a head predicts."""
    logits = rows(state, f"bbox_head.{FAMILIES[family]}.weight")
    if family != "retinanet":
        return logits
    code = rows(state, "bbox_head.retina_reg.weight")
    if code != 4 * ANCHORS or logits % ANCHORS:
        raise UserError(
            f"the checkpoint's RetinaNet predicts {code} box numbers and {logits} class logits a cell, which are not those "
            f"of {ANCHORS} anchors; use one with three sizes and three ratios"
        )
    return logits // ANCHORS


def our_key(key: str) -> str:
    """mmdetection's name of a tensor -> ours; a name without a counterpart comes back as it is."""
    if key.startswith("bbox_head."):
        return "head." + key.removeprefix("bbox_head.")
    if not key.startswith("backbone."):
        return key
    rest = key.removeprefix("backbone.")
    mobile = re.fullmatch(r"layer(\d+)\.(\d+)\.(\w+_conv\.\w+)\.(\w+)", rest)
    if mobile:
        stage, block, place, leaf = int(mobile[1]) - 1, mobile[2], mobile[3], mobile[4]
        places = _MOBILE_FIRST if stage == 0 else _MOBILE_BLOCK
        return f"backbone.body.blocks.{stage}.{block}.{places.get(place, place)}.{leaf}"
    for prefix, our_prefix in _MOBILE_ENDS.items():
        if rest.startswith(prefix):
            return "backbone.body." + our_prefix + rest.removeprefix(prefix)
    return "backbone.body." + rest


def _current(key: str) -> str:
    """Other names of the head's predictors -> those of today."""
    place, _, rest = key.partition(".")
    part, dot, leaf = rest.partition(".")
    return f"{place}.{_OTHER_NAMES[part]}{dot}{leaf}" if place == "bbox_head" and part in _OTHER_NAMES else key


def is_used_key(key: str) -> bool:
    """Whether a tensor is used: it is no constant that mmdetection keeps, nor of a classifier that no level reads."""
    return not (key.startswith(("bbox_head.integral.", "data_preprocessor.", "backbone.fc.")))


def _check_supported(family: str, state: Mapping[str, Tensor]) -> None:
    for key in state:
        place, offset, leaf = key.partition(".conv_offset.")
        if offset and not _DEFORMABLE.get(family, _BACKBONE_DEFORMABLE).fullmatch(place):
            raise UserError(
                f"the checkpoint has a deformable convolution at {place}, where no {family.upper()} of this package has one; "
                "use one without"
            )
        if offset and leaf == "weight" and rows(state, key) != OFFSETS:
            raise UserError(
                f"the checkpoint's deformable convolution at {place} is modulated or in groups, which is not supported; use "
                "one with plain deformable convolutions, or none"
            )
    if family == "reppoints" and ("neck.lateral_convs.0.gn.weight" in state) != (
        "bbox_head.cls_convs.0.gn.weight" in state
    ):
        raise UserError(
            "the checkpoint's RepPoints has group norm in only one of FPN and head, which is not supported; use one with it "
            "in both or in neither"
        )
    if "bbox_head.cls_convs.0.bn.weight" in state:
        raise UserError(
            "the checkpoint's head has batch norm in its towers, which is not supported; use one with group norm or none"
        )
    if sum(k.startswith("neck.fpn_convs.") and k.endswith(".conv.weight") for k in state) != 5:
        raise UserError("the checkpoint's FPN has not the five levels of strides 8 to 128; use one that has")


def backbone_name(state: Mapping[str, Tensor]) -> str:
    if "backbone.layer1.0.depthwise_conv.conv.weight" in state:
        if rows(state, "backbone.conv1.conv.weight") == 32:
            return "mobilenetv2_100"
    elif "backbone.layer3.0.conv1.weight" in state:
        blocks = len({k.split(".")[2] for k in state if k.startswith("backbone.layer3.")})
        name = RESNETS.get((blocks, "backbone.layer3.0.conv3.weight" in state))
        width = [rows(state, "backbone.layer1.0.conv2.weight", dimension) for dimension in (0, 1)]
        if width != [64, 64]:
            name = RESNEXTS.get((blocks, width[0], width[1]))
        if name and "backbone.stem.0.weight" not in state:
            return name
    raise UserError("the checkpoint has a backbone other than ResNet, ResNeXt and MobileNetV2, which is not supported")


def config_text(meta: Any) -> str:
    """The configuration as text: `config` in version 2, `cfg` in version 3."""
    if not isinstance(meta, Mapping):
        return ""
    config = meta.get("cfg") or meta.get("config")
    return config if isinstance(config, str) else ""


def convention(family: str, text: str, file_name: str) -> dict[str, Any]:
    """Style of the ResNet, color order, mean and standard deviation."""
    caffe = bool(re.search(r"style\s*=\s*['\"]caffe['\"]", text)) if text else "caffe" in file_name
    out: dict[str, Any] = {"style": "caffe" if caffe else "pytorch"}
    rgb = re.search(r"(?:bgr_to_rgb|to_rgb)\s*=\s*(True|False)", text)
    mean, std = (re.search(rf"\b{word}\s*=\s*[\[(]([\d., \n]+)[\])]", text) for word in ("mean", "std"))
    if rgb and mean and std:
        return out | {"bgr": rgb[1] == "False", "mean": _numbers(mean[1]), "std": _numbers(std[1])}
    if caffe:
        plain = family == "autoassign" or (family == "fcos" and "normbbox" not in file_name)
        return out | {"bgr": True, "mean": DETECTRON_MEAN if plain else CAFFE_MEAN, "std": (1.0, 1.0, 1.0)}
    return out | {"bgr": False, "mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UserError(f"the configuration in the checkpoint has the numbers '{text}'; use another copy") from error


def _fcos_variant(state: Mapping[str, Tensor], text: str, file_name: str) -> dict[str, Any]:
    """The improvements of FCOS that a file was trained with: by the configuration, the name, or the towers' biases.

    Only the improved configuration gives the towers' convolutions a bias.
    """
    improved = "bbox_head.cls_convs.0.conv.bias" in state
    marks = {"norm_on_bbox": "normbbox", "centerness_on_reg": "centeronreg", "center_sampling": "center-|center_"}
    config_keys = {
        "norm_on_bbox": "norm_on_bbox",
        "centerness_on_reg": "centerness_on_reg",
        "center_sampling": "center_sampling",
    }
    out: dict[str, Any] = {"conv_bias": improved}
    for key, mark in marks.items():
        if text:
            out[key] = bool(re.search(rf"{config_keys[key]}\s*=\s*True", text))
        elif "fcos" in file_name:
            out[key] = bool(re.search(mark, file_name))
        else:
            out[key] = improved
    if text:
        out["relu_before_last"] = _relu_before_last(text)
    return out


def _relu_before_last(text: str) -> bool:
    return bool(re.search(r"relu_before_extra_convs\s*=\s*True", text))


def class_names(meta: Any, classes: int) -> list[str] | None:
    """Class names: `CLASSES` in version 2, `dataset_meta` in version 3."""
    if not isinstance(meta, Mapping):
        return None
    data = meta.get("dataset_meta")
    names = meta.get("CLASSES") or (data.get("classes") or data.get("CLASSES") if isinstance(data, Mapping) else None)
    if not isinstance(names, list | tuple) or len(names) != classes:
        return None
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < classes:
        raise UserError("the checkpoint's class names should be texts, none empty and none twice; use another copy")
    return list(names)
