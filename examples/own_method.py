"""A distillation method of one's own: the mean squared difference of the necks' maps.

python examples/own_method.py [--epochs N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch.nn.functional as F
from rectangles import SHORT, write_data

from yoloxkd import Trainer
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.adapters import Adapters
from yoloxkd.kd.base import Distiller, KDConfig, Step
from yoloxkd.kd.pairing import Pairing
from yoloxkd.types import DetectorOutput, Loss, Losses, LossName, Tap


class L2(Distiller):
    """The mean squared difference of neck maps, level by level."""

    Config = KDConfig
    name = "l2"

    def __init__(self, cfg: KDConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        self.needs = frozenset({Tap.NECK})
        self.adapters = Adapters(pairing, self.needs)  # bring the student's channels to the teacher's
        self.terms = tuple(LossName(self.name, "neck", level.stride) for level in pairing.levels)

    def compare(self, step: Step[DetectorOutput]) -> Losses:
        losses: Losses = {}
        for level in self.pairing.levels:
            ours, theirs = step.maps(Tap.NECK, level)
            ours = self.adapters(ours, theirs, Tap.NECK, level)
            losses[LossName(self.name, "neck", level.stride)] = Loss(F.mse_loss(ours, theirs.to(ours.dtype)))
        return losses


DISTILLERS["l2"] = L2

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--out", type=Path, default=Path("runs/own-method"))
arguments = parser.parse_args()

data = str(write_data(arguments.out / "data", ["red", "blue"]))
run = {"student": "yolox-nano", "data": data, "epochs": arguments.epochs, "batch": 8, "imgsz": 96}
teacher = Trainer(out=arguments.out / "teacher", set=SHORT, **run).fit().best  # type: ignore[arg-type]
keys = SHORT | {"kd.l2.weight": 0.5, "teacher.min_ap": 0}
print("student:", Trainer(teacher=str(teacher), kd="l2", out=arguments.out / "student", set=keys, **run).fit().best)  # type: ignore[arg-type]
