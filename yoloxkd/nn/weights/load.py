"""Load checkpoint files into a detector and report every disagreement."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy._core.multiarray as np_multiarray
import torch
from torch import Tensor

from yoloxkd.config.files import cfg_folder, cfg_names
from yoloxkd.config.load import read_yaml
from yoloxkd.download import Published
from yoloxkd.errors import UserError
from yoloxkd.file_kinds import check_not_exported
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.weights.mmdet_history import HISTORY_GLOBALS, MARK
from yoloxkd.nn.weights.other_files import what_else
from yoloxkd.nn.weights.published import PUBLISHED

__all__ = [
    "PUBLISHED",
    "LoadReport",
    "OfficialState",
    "Published",
    "load_checkpoint_file",
    "load_into",
    "official_state",
]

MINIMUM_SHARE = 0.5
MOST_ROWS = 100_000
"""Channels or classes of a layer; more is no network's."""
SHOWN = 3

_NUMPY_NUMBERS: list[Any] = [
    (np_multiarray.scalar, "numpy.core.multiarray.scalar"),
    (np_multiarray.scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64")),
]
"""Megvii's trainer keeps its best AP as a numpy number beside the weights; these classes hold plain values."""
_OBJECTS = re.compile("reduce for unrecognized function|new object for arbitrary class|set state of objects")
"""Of what torch says where a pickle makes objects without naming their class in a way that it tells."""


def load_checkpoint_file(path: str | Path) -> dict[str, Any]:
    """A checkpoint's dictionary, on the CPU. Only tensors, numbers and plain containers are unpickled: no code of the file runs.

    The training log that mmdetection 3 keeps beside the weights is dropped.

    Raises UserError when the file is absent, empty, not a checkpoint, or needs other classes to be unpickled.
    """
    path = Path(path)
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UserError(f"checkpoint {path} {what}; give the path of a .pth or .pt file")
    if path.stat().st_size == 0:
        raise UserError(f"checkpoint {path} is empty (0 bytes); copy or download it again")
    check_not_exported(path)
    if not os.access(path, os.R_OK):
        raise UserError(f"checkpoint {path} cannot be read; its permissions do not allow it")
    if (other := what_else(path)) is not None:
        raise UserError(f"{path} is {other}")
    try:
        raw = _unpickled(path)
    except Exception as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign or _OBJECTS.search(str(error)):
            kind = f" ({foreign[1]})" if foreign else ""
            raise UserError(
                f"checkpoint {path} holds objects besides tensors{kind}, and loading those could run code; save only its "
                "state dict to a new file and use that: torch.save(model.state_dict(), FILE)"
            ) from error
        raise UserError(f"{path} is not a PyTorch checkpoint, or it is damaged; copy or download it again") from error
    if not isinstance(raw, dict):
        raise UserError(
            f"checkpoint {path} holds a {type(raw).__name__}, not a dictionary of weights; save the model's state dict instead"
        )
    return raw


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if MARK not in str(error):
            raise
    with torch.serialization.safe_globals(_NUMPY_NUMBERS + HISTORY_GLOBALS):
        return torch.load(path, map_location="cpu", weights_only=True)


@dataclass(slots=True)
class OfficialState:
    """The weights of an official YOLOX checkpoint under our names.

    state         {key of YOLOX.state_dict(): tensor}; keys that have no place there keep their own names
    source        "megvii" or "mmdetection"
    num_classes   classes it predicts
    architecture  name such as "yolox-nano", or None when no named architecture has this depth and width
    """

    state: dict[str, Tensor]
    source: str
    num_classes: int
    architecture: str | None


def official_state(raw: Mapping[str, Any]) -> OfficialState | None:
    """Recognize a Megvii or mmdetection YOLOX checkpoint, bare or wrapped ({"model": ...}, {"state_dict": ...}).

    raw as from `load_checkpoint_file`. None when it is neither.
    """
    for candidate in (raw.get("model"), raw.get("state_dict"), raw):
        if not isinstance(candidate, Mapping):
            continue
        state = {str(k).removeprefix("module."): v for k, v in candidate.items() if isinstance(v, Tensor)}
        source = "megvii"
        if "bbox_head.multi_level_conv_cls.0.bias" in state:
            # Flat `ema_...` keys are the not averaged twins of weights that the file also has under their own names.
            state = {from_mmdetection(k): v for k, v in state.items() if not k.startswith("ema_")}
            source = "mmdetection"
        if {"backbone.backbone.stem.conv.conv.weight", "head.cls_preds.0.bias"} <= state.keys():
            return OfficialState(state, source, rows(state, "head.cls_preds.0.bias"), _architecture(state))
    return None


def rows(state: Mapping[str, Tensor], key: str, dimension: int = 0) -> int:
    """The size of a tensor's dimension: of the first, the channels or classes that a layer gives; of the second, its inputs.

    UserError: there is no such tensor, or its size is that of no layer.
    """
    if key not in state:
        raise UserError(f"the checkpoint lacks {key}; use another copy")
    shape = state[key].shape
    if len(shape) <= dimension or not 1 <= shape[dimension] <= MOST_ROWS:
        raise UserError(
            f"the checkpoint's {key} has the shape {list(shape)}, which is that of no layer; use another copy"
        )
    return shape[dimension]


_MMDETECTION_PLACES = {
    "backbone.stem.": "backbone.backbone.stem.",
    "backbone.stage1.": "backbone.backbone.dark2.",
    "backbone.stage2.": "backbone.backbone.dark3.",
    "backbone.stage3.": "backbone.backbone.dark4.",
    "backbone.stage4.": "backbone.backbone.dark5.",
    "neck.reduce_layers.0.": "backbone.lateral_conv0.",
    "neck.reduce_layers.1.": "backbone.reduce_conv1.",
    "neck.top_down_blocks.0.": "backbone.C3_p4.",
    "neck.top_down_blocks.1.": "backbone.C3_p3.",
    "neck.downsamples.0.": "backbone.bu_conv2.",
    "neck.downsamples.1.": "backbone.bu_conv1.",
    "neck.bottom_up_blocks.0.": "backbone.C3_n3.",
    "neck.bottom_up_blocks.1.": "backbone.C3_n4.",
    "neck.out_convs.": "head.stems.",
    "bbox_head.multi_level_cls_convs.": "head.cls_convs.",
    "bbox_head.multi_level_reg_convs.": "head.reg_convs.",
    "bbox_head.multi_level_conv_cls.": "head.cls_preds.",
    "bbox_head.multi_level_conv_reg.": "head.reg_preds.",
    "bbox_head.multi_level_conv_obj.": "head.obj_preds.",
}
_MMDETECTION_BLOCKS = {
    "main_conv": "conv1",
    "short_conv": "conv2",
    "final_conv": "conv3",
    "blocks": "m",
    "depthwise_conv": "dconv",
    "pointwise_conv": "pconv",
}


def from_mmdetection(key: str) -> str:
    """mmdetection's name of a YOLOX tensor -> ours; a name without a counterpart comes back as it is."""
    for prefix, our_prefix in _MMDETECTION_PLACES.items():
        if key.startswith(prefix):
            rest = key.removeprefix(prefix).split(".")
            return our_prefix + ".".join(_MMDETECTION_BLOCKS.get(part, part) for part in rest)
    return key


def _architecture(state: Mapping[str, Tensor]) -> str | None:
    """The named architecture whose channels, blocks and kind of convolution a state in our names has."""
    signature = (
        len({key.split(".")[5] for key in state if key.startswith("backbone.backbone.dark2.1.m.")}),
        rows(state, "backbone.backbone.stem.conv.conv.weight"),
        "backbone.backbone.dark2.0.dconv.conv.weight" in state,
    )
    for name in cfg_names("models"):
        keys = read_yaml(cfg_folder() / "models" / f"{name}.yaml")
        if keys["family"] != "yolox":
            continue
        blocks, channels = max(round(keys["depth"] * 3), 1), int(keys["width"] * 64)
        if (blocks, channels, keys.get("depthwise", False)) == signature:
            return name
    return None


@dataclass(slots=True)
class LoadReport:
    """What a checkpoint gave to a detector.

    loaded, total              parameters (numbers, not tensors) loaded, and those of the detector
    missing                    keys of the detector that the checkpoint lacks
    unexpected                 keys of the checkpoint that the detector lacks
    mismatched                 keys left out because their shapes differ (class predictors only)
    class_predictors_skipped   the class predictors were left untrained, because the classes differ
    """

    loaded: int
    total: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    class_predictors_skipped: bool = False

    @property
    def share(self) -> float:
        """Loaded part of the parameters, 0 to 1."""
        return self.loaded / max(self.total, 1)

    @property
    def complete(self) -> bool:
        """Everything came from the checkpoint, and everything in it was used."""
        return not (self.missing or self.unexpected or self.class_predictors_skipped)

    def describe(self) -> str:
        """One line for the log."""
        parts = [f"{self.loaded} of {self.total} parameters loaded ({self.share:.1%})"]
        if self.class_predictors_skipped:
            parts.append("class predictors left untrained because the classes differ")
        if self.missing:
            parts.append(f"{len(self.missing)} keys missing in the checkpoint: {_some(self.missing)}")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} keys of the checkpoint unused: {_some(self.unexpected)}")
        return "; ".join(parts)


def load_into(
    model: Detector[Any, Any], state: Mapping[str, Tensor], *, allow_class_mismatch: bool, keep_classes: bool = True
) -> LoadReport:
    """Copy a checkpoint's weights into a detector, in place.

    allow_class_mismatch  another number of classes: load all but the class predictors; False: a UserError
    keep_classes          False leaves the class predictors out although their shapes may agree (other class names)
    Raises UserError when shapes differ anywhere else (another architecture), when convolutions are deformable there and not
    here, or when less than half of the detector's parameters would be loaded.
    """
    model_state = model.state_dict()
    predictors = [key for key in model_state if key.startswith(model.class_predictors)]
    model_state = {key: value for key, value in model_state.items() if not key.startswith(model.run_state)}
    state = {key: value for key, value in state.items() if not key.startswith(model.run_state)}
    missing = [key for key in model_state if key not in state]
    unexpected = [key for key in state if key not in model_state]
    _check_deformable(unexpected)
    mismatched = [key for key in model_state if key in state and model_state[key].shape != state[key].shape]
    # Another number of classes changes the first dimension of the class predictors and nothing else.
    by_classes = [key for key in mismatched if key in predictors and model_state[key].shape[1:] == state[key].shape[1:]]
    elsewhere = [key for key in mismatched if key not in by_classes]
    if elsewhere:
        shapes = (
            f"{key} is {_shape(state[key])} there and {_shape(model_state[key])} here" for key in elsewhere[:SHOWN]
        )
        raise UserError(
            f"the checkpoint belongs to another architecture: {'; '.join(shapes)}; choose the model it is of"
        )
    if by_classes and not allow_class_mismatch:
        checkpoint_classes, model_classes = state[by_classes[0]].shape[0], model_state[by_classes[0]].shape[0]
        raise UserError(
            f"the checkpoint predicts {checkpoint_classes} classes and the model {model_classes}; build the model with "
            "the checkpoint's classes"
        )
    skipped = set(predictors) if by_classes or not keep_classes else set()
    weights = {key: state[key] for key in model_state if key in state and key not in skipped}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    report = LoadReport(
        loaded=sum(size for name, size in sizes.items() if name in weights),
        total=sum(sizes.values()),
        missing=missing,
        unexpected=unexpected,
        mismatched=by_classes,
        class_predictors_skipped=bool(skipped),
    )
    if report.share < MINIMUM_SHARE:
        raise UserError(
            f"the checkpoint fits only {report.share:.0%} of the model's parameters, so it is of another architecture; "
            f"missing: {_some(missing)}; not known here: {_some(unexpected)}"
        )
    check_tensors(model_state, weights)
    model.load_state_dict(weights, strict=False)
    return report


def _check_deformable(unexpected: Sequence[str]) -> None:
    """UserError: a checkpoint has deformable convolutions where the model has plain ones, which would look elsewhere."""
    places = [key.partition(".conv_offset.")[0] for key in unexpected if ".conv_offset." in key]
    if not places:
        return
    stages = {place.split(".")[2] for place in places if place.startswith("backbone.body.layer")}
    remedy = f"set student.deformable_stages={len(stages)}" if stages else "choose the model it is of"
    raise UserError(
        f"the checkpoint has a deformable convolution at {places[0]}, where the model has a plain one; {remedy}"
    )


def check_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """UserError: a tensor of a file, of a shape that fits, holds numbers that cannot be those of a network."""
    for key, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise UserError(f"its {key} is no plain tensor of numbers; save the weights again as such")
        if expected[key].is_floating_point() and not value.is_floating_point():
            raise UserError(
                f"its {key} holds {_kind(value)} numbers instead of {_kind(expected[key])}; use another copy"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
            raise UserError(
                f"its {key} holds numbers that are not finite (NaN or infinity): that training had failed; use an earlier file"
            )


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """UserError: a state of a file has not the very tensors of `expected`, by name and shape, or as `check_tensors`."""
    missing, unknown = [key for key in expected if key not in state], [key for key in state if key not in expected]
    if missing or unknown:
        raise UserError(f"missing in it: {_some(missing)}; not known here: {_some(unknown)}")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise UserError(f"its {key} is {_shape(value)} and should be {_shape(expected[key])}")
    check_tensors(expected, state)


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "") if keys else "none"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"
