"""The main job, end to end, on the generated `shapes` set: about five minutes on two CPU cores.

    python examples/demo.py [--out FOLDER] [--seed N]

Trains a teacher; trains a smaller student twice with the same seed, alone and under the teacher (PGD); measures all
three on the test split; exports the distilled student to ONNX, which is refused unless it detects the same; predicts on
a held-out image; prints one table. Everything is written to the folder, which is emptied first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from yoloxkd import Detector, Trainer
from yoloxkd.data.data_spec import find_data, load_split

SIZE = 160  # px
BATCH = 8
TEACHER_EPOCHS, STUDENT_EPOCHS = 7, 4
# a short schedule wants plain images, one evaluation and eight times the recipe's learning rate
SHORT = {
    "augment.multiscale": 0,
    "augment.mosaic": 0.0,
    "optim.lr_per_image": 1.25e-3,
    "engine.workers": 1,
    "val.interval": 100,
}


def milliseconds(detector: Detector, image: np.ndarray, runs: int = 30) -> float:
    """Median wall time of `predict` on one image, pre- and post-processing included."""
    times = []
    for _ in range(runs + 3):
        started = time.perf_counter()
        detector.predict(image)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, console, started = arguments.out, Console(), time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)

    def train(title: str, folder: str, epochs: int, **options: object) -> Path:
        console.rule(title)
        trainer = Trainer(
            data="shapes",
            imgsz=SIZE,
            batch=BATCH,
            epochs=epochs,
            seed=arguments.seed,
            device="cpu",
            out=out / folder,
            **options,
        )
        return trainer.fit().best

    student = SHORT | {"student.width": 0.125}
    teacher = train("1  teacher", "teacher", TEACHER_EPOCHS, student="yolox-tiny", set=SHORT | {"student.width": 0.25})
    plain = train("2  student alone", "plain", STUDENT_EPOCHS, student="yolox-tiny", set=student)
    taught = train(
        "3  the same student under the teacher (PGD)",
        "distilled",
        STUDENT_EPOCHS,
        student="yolox-tiny",
        teacher=str(teacher),
        kd="pgd",
        # a teacher of two minutes knows little: let it say a tenth of what the task says (default: half)
        set=student | {"kd.auto_share": 0.1},
    )

    console.rule("4  test split, export, prediction")
    test = load_split(find_data("shapes"), "test")
    picture = next(i for i in range(len(test)) if len(test.annotations(i)[0]) >= 5)
    image = test.read(picture)
    models = {"teacher": teacher, "student alone": plain, "student distilled": taught}
    metrics = {name: Detector(path, "cpu").val("shapes", split="test", workers=0) for name, path in models.items()}
    exported = Detector(taught, "cpu").export(out / "student.onnx", verify="shapes")
    models["distilled, ONNX"] = exported
    metrics["distilled, ONNX"] = Detector(exported).val("shapes", split="test", workers=0)
    parity = json.loads(exported.with_suffix(".parity.json").read_text())

    found = Detector(exported).predict(image, conf=0.1)[0]  # a student of a minute is seldom surer
    drawn = out / "prediction.png"
    cv2.imwrite(str(drawn), cv2.cvtColor(found.plot(image), cv2.COLOR_RGB2BGR))

    table = Table(title=f"shapes, test split, {SIZE} px, seed {arguments.seed}")
    for column in ("model", "AP", "AP50", "file MB", "ms an image"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, path in models.items():
        speed = milliseconds(Detector(path, "cpu"), image)
        size = path.stat().st_size / 1e6
        table.add_row(name, f"{metrics[name]['AP']:.3f}", f"{metrics[name]['AP50']:.3f}", f"{size:.2f}", f"{speed:.1f}")
    console.print(table)
    console.print(
        "Minutes of training show that the whole way works; whether distillation helps is measured in docs/results.md.",
        highlight=False,
    )
    found_same = parity["found"]
    console.print(
        f"ONNX against PyTorch on {parity['images']} validation images: {found_same['detections']} detections, "
        f"{found_same['unmatched']} without counterpart; least IoU {found_same['min_iou']:.6f}, "
        f"largest score difference {found_same['max_score_difference']:.1e}"
    )
    for label, path in [*models.items(), ("prediction", drawn), ("curves", out / "distilled" / "plots" / "curves.png")]:
        console.print(f"{label:18} {path}", highlight=False)
    console.print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
