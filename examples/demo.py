"""The main job, end to end, on the generated set `shapes-easy`: a few minutes on two CPU cores.

    python examples/demo.py [--out FOLDER] [--seed N]

Trains a small student twice with the same seed, alone and under the teacher `examples/teacher.pt`, both at the same time
with a core each (so small a network gains little from a second thread); measures all three on the test split; exports the distilled student to ONNX, which is refused unless it detects the same; draws both students'
detections beside the ground truth; prints one table. Each step is a `yoloxkd` command, and is shown before it runs.
Everything is written to the folder; what an earlier demo left there is removed first, and a folder that holds anything else is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from yoloxkd import Detector
from yoloxkd.cli import run
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.drawing import draw_boxes
from yoloxkd.write_image import write_image

EXAMPLES = Path(os.path.relpath(Path(__file__).resolve().parent))
DATA = "shapes-easy"
TEACHER, RECIPE = EXAMPLES / "teacher.pt", EXAMPLES / "demo.yaml"
KD = ("--kd", "response")
SPLITS = ("train", "val", "test")
PICTURES, CONF, GAP = 4, 0.4, 6
LOG = "plain.log"
WRITTEN = {
    LOG,
    "plain",
    "distilled",
    "student.onnx",
    "student.parity.json",
    "test.json",
    "explained",
    "side-by-side.png",
}
"""What the demo leaves in its folder."""
console = Console(highlight=False, soft_wrap=True)


def command(*arguments: object) -> None:
    """Show a `yoloxkd` command as one types it, and run it. SystemExit: it failed."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n[bold]$ yoloxkd {shlex.join(words)}[/bold]")
    if status := run(words):
        sys.exit(status)


def at_the_same_time(watched: tuple[object, ...], other: tuple[object, ...], log: Path) -> None:
    """Run two `yoloxkd` commands with a thread each; the other one prints to `log`. SystemExit: one failed; the other is ended."""
    commands = [[str(word) for word in words] for words in (watched, other)]
    for words, ending in zip(commands, ("", f"    (at the same time, printing to {log})"), strict=True):
        console.print(f"\n[bold]$ OMP_NUM_THREADS=1 yoloxkd {shlex.join(words)}[/bold]{ending}")
    first, second = ([sys.executable, "-m", "yoloxkd", *words] for words in commands)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as file,
        subprocess.Popen(first, env=environment) as shown,
        subprocess.Popen(second, env=environment, stdout=file, stderr=file) as beside,
    ):
        both = shown, beside
        try:
            while None in (codes := [process.poll() for process in both]) and not any(codes):
                time.sleep(0.2)
        finally:
            for process in both:
                process.terminate()
    if any(codes):
        sys.exit(codes[0] or f"{log.read_text()}\nthe plain student's training failed with status {codes[1]}")


def draw(models: dict[str, Path], output: Path) -> None:
    """Ground truth above, each model's detections below it: the first test images with three objects or more."""
    data = load_split(find_data(DATA), "test")
    chosen = [i for i in range(len(data)) if len(data.annotations(i)[0]) >= 3][:PICTURES]
    images = [data.read(i) for i in chosen]
    drawn = {"ground truth": []}
    for image, (boxes, labels, _) in zip(images, map(data.annotations, chosen), strict=True):
        drawn["ground truth"].append(draw_boxes(image, boxes, labels, [data.names[k] for k in labels]))
    for name, model in models.items():
        drawn[name] = [found.plot() for found in Detector(model, "cpu").predict(images, conf=CONF)]
    sheet = []
    for name, row in drawn.items():
        line = np.hstack([np.pad(one, ((0, 0), (0, GAP), (0, 0)), constant_values=255) for one in row])
        title = np.full((36, line.shape[1], 3), 255, np.uint8)
        cv2.putText(title, name, (8, 25), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (0, 0, 0), 2, cv2.LINE_AA)
        sheet += [title, line]
    write_image(output, np.vstack(sheet))


def table(models: dict[str, Path], measured: list[dict[str, Any]], seed: int) -> Table:
    """AP and AP50 of the models on the test split, and what the student alone and the distilled one are apart."""
    shown = Table(title=f"{DATA}, test split, seed {seed}")
    for column in ("model", "parameters", "AP", "AP50"):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for (name, path), row in zip(models.items(), measured, strict=True):
        network = None if path.suffix == ".onnx" else Detector(path, "cpu").network
        size = "" if network is None else f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M"
        shown.add_row(name, size, *(f"{100 * row[key]:.1f}" for key in ("AP", "AP50")))
    alone, distilled = measured[1], measured[2]
    gains = (f"{100 * (distilled[key] - alone[key]):+.1f}" for key in ("AP", "AP50"))
    shown.add_section()
    shown.add_row("gained by distillation", "", *gains)
    return shown


def clear(out: Path) -> None:
    """Remove what an earlier demo left in a folder. SystemExit: the folder holds something else."""
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    strange = [name for name in there if name not in WRITTEN or LOG not in there]
    if strange:
        sys.exit(f"{out} holds {strange[0]}, which is not of an earlier demo; give another --out")
    for name in there:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, started = arguments.out, time.perf_counter()
    clear(out)

    student = ("train", "--recipe", RECIPE, "--seed", arguments.seed)
    plain, distilled, onnx = out / "plain" / "best.pt", out / "distilled" / "best.pt", out / "student.onnx"
    console.print(
        f"data {DATA}: {', '.join(f'{split} {len(load_split(find_data(DATA), split))}' for split in SPLITS)} images"
    )
    under_the_teacher = (*student, "--teacher", TEACHER, *KD, "--out", distilled.parent)
    at_the_same_time(under_the_teacher, (*student, "--out", plain.parent), out / LOG)
    command("export", distilled, "--output", onnx)
    models = {"teacher": TEACHER, "student alone": plain, "student distilled": distilled, "distilled, as ONNX": onnx}
    test = ("--data", DATA, "--split", "test")
    command("val", *models.values(), *test, "--workers", 0, "--json", out / "test.json")
    command("explain", plain, distilled, "--teacher", TEACHER, *test, "--limit", 50, "--out", out / "explained")
    draw({"student alone": plain, "student distilled": distilled}, out / "side-by-side.png")

    console.print(table(models, json.loads((out / "test.json").read_text()), arguments.seed))
    proof = json.loads(onnx.with_suffix(".parity.json").read_text())
    same = proof["found"]
    console.print(
        f"The ONNX file detects the same: on {proof['images']} validation images {same['detections']} detections, "
        f"{same['unmatched']} without counterpart, least IoU {same['min_iou']:.6f}, "
        f"largest score difference {same['max_score_difference']:.1e}"
    )
    pages = {
        "side by side": out / "side-by-side.png",
        "what teacher and students look at": out / "explained" / "explain.html",
        "the distilled run": distilled.parent / "report.html",
        "the plain run": plain.parent / "report.html",
        "for your device": onnx,
    }
    for name, file in pages.items():
        console.print(f"{name:34} [link={file.resolve().as_uri()}]{file}[/link]")
    console.print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
