"""Train on data of your own in YOLO format, measure, detect, draw.

python examples/own_data.py [--epochs N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rectangles import SHORT, write_data

from yoloxkd import Detector, Trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--out", type=Path, default=Path("runs/own-data"))
arguments = parser.parse_args()

data = write_data(arguments.out / "data", ["red", "blue"])  # put the path of your own data.yaml here
fit = Trainer(
    student="yolox-nano",
    data=str(data),
    epochs=arguments.epochs,
    batch=8,
    imgsz=96,
    out=arguments.out / "run",
    set=SHORT,
).fit()

detector = Detector(fit.best)
results = detector(data.parent / "images" / "val" / "0.png", conf=0.3)
for one in results[0]:
    print(one.name, round(one.score, 2), one.box)
print("drawn:", results[0].save(arguments.out / "drawn.png"))
print("AP", round(detector.val(str(data), workers=0)["AP"], 3))
