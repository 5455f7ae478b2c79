"""How long the command line takes to answer, and how soon the first batch is trained."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.report import Row, run_script
from benchmarks.timing import Spread, alternate, ratio, with_children

LIMIT = 0.3
ANSWERS = {
    "--help": ["--help"],
    "train --help": ["train", "--help"],
    "an unknown option": ["train", "--no-such-option"],
}
IMPORTS = "import torch, torchvision, cv2, albumentations, yoloxkd.api, yoloxkd.assembly.run"
FIRST_BATCH = """
import os, sys
from yoloxkd.engine.trainer import Fit
step = Fit._batch
def first(self, batch):
    step(self, batch)
    os._exit(0)
Fit._batch = first
from yoloxkd.cli import main
main(["train", "--student", "yolox-nano", "--data", "shapes", "--epochs", "1", "--batch", "8", "--imgsz", "320",
      "--device", "cpu", "--set", "augment.multiscale=0", "--out", sys.argv[1]])
"""


def python(arguments: Sequence[str]) -> None:
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def first_batch(folder: str) -> None:
    python(["-c", FIRST_BATCH, tempfile.mkdtemp(dir=folder) + "/run"])


def measure(quick: bool) -> Iterator[Row]:
    turns = {what: partial(python, ["-m", "yoloxkd", *arguments]) for what, arguments in ANSWERS.items()}
    samples = alternate(turns, 1 if quick else 15, cpu_clock=with_children)
    for what, found in samples.items():
        yield Row(f"yoloxkd {what}", Spread.of(found.wall), Spread.of(found.cpu), at_most=LIMIT, unit="s")
    if quick:
        return
    with tempfile.TemporaryDirectory() as folder:
        sides = {"imports": partial(python, ["-c", IMPORTS]), "first": partial(first_batch, folder)}
        samples = alternate(sides, 6, cpu_clock=with_children)
    yield Row(
        "command to the end of the first training batch / bare imports, yolox-nano, shapes, 8 images of 320 px",
        *ratio(samples["first"], samples["imports"]),
        at_most=1.5,
        note=f"{samples['first'].seconds:.2f} s / {samples['imports'].seconds:.2f} s ({IMPORTS})",
    )


if __name__ == "__main__":
    run_script("start", "Starting", measure)
