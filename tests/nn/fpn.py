"""FPN detectors small enough for tests: a quarter of a million weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from yoloxkd.nn.dense.fpn_detector import FPNDetector

BACKBONE = "mobilenetv2_035"
SHALLOW = "test_resnet"
"""A backbone of a fifth of its operators."""


def narrow(kind: type[FPNDetector], names: int | Sequence[str] = 3, **changes: Any) -> Any:
    """A detector of the kind on a narrow MobileNetV2, everything trainable; `names` may be a number of classes."""
    groups = None if kind.Config.model_fields["groups"].default is None else 4  # towers without norm stay without
    keys: dict[str, Any] = {
        "backbone": BACKBONE, "backbone_weights": "none", "frozen_stages": 0, "norm_eval": False,
        "channels": 16, "groups": groups, "stacked_convs": 2,
    }  # fmt: skip
    classes = [f"class{i}" for i in range(names)] if isinstance(names, int) else list(names)
    return kind(kind.Config(**(keys | changes)), classes)  # type: ignore[arg-type]
