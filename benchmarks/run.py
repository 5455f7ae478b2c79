"""Every benchmark, each in a process of its own, and benchmarks/results.md: `python -m benchmarks.run [NAME ...]`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.peers import use_peers
from benchmarks.report import FOLDER, table

SCRIPTS = (
    "simota",
    "kd_losses",
    "dense_losses",
    "kd_baselines",
    "kd_methods",
    "steps",
    "train_step",
    "two_stage",
    "coco_eval",
    "data",
    "large_coco",
    "start",
    "growth",
    "compiled",
)
RESULTS = Path(__file__).parent / "results.md"
PACKAGES = ("torch", "numpy", "opencv-python-headless", "hotcoco", "pycocotools")


def machine() -> list[str]:
    """What the numbers were measured on and with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {name: version(name) for name in PACKAGES} | use_peers()
    return [
        f"Date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        f"Machine: {cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {platform.system()}; no GPU used",
        f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}, {torch.get_num_threads()} threads of torch",
        f"Versions: Python {platform.python_version()}, {', '.join(f'{k} {v}' for k, v in versions.items())}",
    ]


def write_results(names: list[str]) -> None:
    parts = ["# Benchmarks", "", *(f"* {line}" for line in machine()), ""]
    parts += [
        "Written by `make bench`. Two sides of a ratio run alternately in one process; a number is the median of the",
        "paired ratios, with their quartiles. Wall time decides; CPU time (all threads) is beside it.",
    ]
    for name in names:
        kept = json.loads((FOLDER / f"{name}.json").read_text())
        assert not kept["quick"], f"the rows of {name} come from a smoke test; run it without --quick"
        parts += ["", f"## {kept['title']} (`python -m benchmarks.{name}`)", "", table(kept["rows"])]
    RESULTS.write_text("\n".join(parts) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ({', '.join(SCRIPTS)}); default: all")
    names = parser.parse_args().names or list(SCRIPTS)
    failed = []
    for name in names:
        started = time.perf_counter()
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode:
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - started:.0f} s\n", flush=True)
    measured = [name for name in SCRIPTS if (FOLDER / f"{name}.json").is_file()]
    write_results(measured)
    print(f"written: {RESULTS}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
