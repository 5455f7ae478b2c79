"""One student of three classes under two teachers, each of which knows some of them.

python examples/two_teachers.py [--epochs N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rectangles import SHORT, write_data

from yoloxkd import Trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--out", type=Path, default=Path("runs/two-teachers"))
arguments = parser.parse_args()


def train(name: str, classes: list[str], **options: object) -> Path:
    """Train a YOLOX-nano on pictures of these classes; its best.pt."""
    data = write_data(arguments.out / "data" / name, classes)
    run = {"student": "yolox-nano", "epochs": arguments.epochs, "batch": 8, "imgsz": 96, "out": arguments.out / name}
    return Trainer(data=str(data), **{"set": SHORT} | run | options).fit().best  # type: ignore[arg-type]


teachers = [str(train("warm", ["red"])), str(train("cold", ["blue", "green"]))]
# the classes are matched by name; a teacher below teacher.min_ap would be refused, and these have learned little
keys = SHORT | {"teacher.weight": [1.0, 0.5], "teacher.min_ap": 0}
print("student:", train("student", ["red", "green", "blue"], teacher=teachers, kd="pgd", set=keys))
