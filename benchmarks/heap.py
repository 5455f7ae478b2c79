"""A training step on the CPU that keeps freed memory, as a run does (`yoloxkd.engine.heap`), against one under glibc's own rules."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext

from benchmarks.report import Row, run_script
from benchmarks.scenes import batch_of, detector
from benchmarks.steps_of import training_step
from benchmarks.timing import Samples, Spread, ratio
from yoloxkd.engine.heap import kept_heap

SIDES = ("kept", "given back")


def one_process(side: str, name: str, images: int, size: int, steps: int) -> None:
    """Prints seconds of each step after the first, and the most memory in MiB."""
    with kept_heap() if side == "kept" else nullcontext():
        weights = {} if name.startswith("yolox") else {"backbone_weights": "none"}
        step = training_step(detector(name, **weights), batch_of(images, 8, size))
        wall, cpu = [], []
        for _ in range(1 + steps):
            began = time.perf_counter(), time.process_time()
            step()
            wall.append(time.perf_counter() - began[0])
            cpu.append(time.process_time() - began[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"wall": wall[1:], "cpu": cpu[1:], "most": most}))


def measure(quick: bool) -> Iterator[Row]:
    cases = (("yolox-nano", 1, 64),) if quick else (("fcos-mobilenetv2", 2, 640), ("yolox-s", 4, 640))
    for name, images, size in cases:
        samples = {side: Samples() for side in SIDES}
        most = dict.fromkeys(SIDES, 0.0)
        for number in range(1 if quick else 3):
            for side in SIDES if number % 2 else SIDES[::-1]:
                command = [sys.executable, "-m", "benchmarks.heap", "child", side, name, str(images), str(size), "2"]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                samples[side].wall += found["wall"]
                samples[side].cpu += found["cpu"]
                most[side] = max(most[side], found["most"])
        yield Row(
            f"a step that gives memory back / one that keeps it, {name}, {images} images of {size} px",
            *ratio(samples["given back"], samples["kept"]),
            note=f"{samples['given back'].milliseconds} / {samples['kept'].milliseconds}; at most "
            f"{most['given back']:.0f} / {most['kept']:.0f} MiB",
        )
        memory = Spread.of([most["kept"] / most["given back"]])
        yield Row(f"the most memory of the process that keeps it / the other's, {name}", memory, at_most=1.1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        one_process(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:7]))
    else:
        run_script("heap", "Memory that a training step frees, kept or given back", measure)
