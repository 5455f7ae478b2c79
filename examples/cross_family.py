"""Distil a YOLOX into a detector of another family: FCOS on MobileNetV2.

    python examples/cross_family.py [--epochs N] [--out FOLDER]

PKD compares feature maps by correlation, so that it does not matter how large the values of either family are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rectangles import SHORT, write_data

from yoloxkd import Trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--out", type=Path, default=Path("runs/cross-family"))
arguments = parser.parse_args()

data = str(write_data(arguments.out / "data", ["red", "blue"]))
run = {"data": data, "epochs": arguments.epochs, "batch": 8, "imgsz": 96}
teacher = Trainer(student="yolox-nano", out=arguments.out / "teacher", set=SHORT, **run).fit()  # type: ignore[arg-type]

# without ImageNet's weights nothing is downloaded; leave the two keys of the backbone out for the real thing
keys = SHORT | {"student.backbone_weights": "none", "student.norm_eval": False, "teacher.min_ap": 0}
fit = Trainer(
    student="fcos-mobilenetv2",
    teacher=str(teacher.best),
    kd="pkd",
    out=arguments.out / "student",
    set=keys,
    **run,  # type: ignore[arg-type]
).fit()
print("teacher", round(teacher.metrics["AP"], 3), "student", round(fit.metrics["AP"], 3))
