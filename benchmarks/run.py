"""Every benchmark, or those that are named, each in a process of its own, and their sections of benchmarks/results.md."""

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
    "memory_format",
    "heap",
    "coco_eval",
    "data",
    "large_coco",
    "start",
    "growth",
    "compiled",
)
RESULTS = Path(__file__).parent / "results.md"
HEAD = """\
Written by `make bench`. Two sides of a ratio run alternately in one process; a number is the median of the
paired ratios, with their quartiles. Wall time decides; CPU time (all threads) is beside it."""
PACKAGES = ("torch", "numpy", "opencv-python-headless", "hotcoco", "pycocotools")


def machine() -> list[str]:
    """What the numbers were measured on and with."""
    versions = {name: version(name) for name in PACKAGES} | use_peers()
    return [
        f"Date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        f"Machine: {_cpu()}, {len(os.sched_getaffinity(0))} cores, {_gibibytes():.0f} GiB, {platform.system()}; no GPU used",
        f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}, {torch.get_num_threads()} threads of torch",
        f"Versions: Python {platform.python_version()}, {', '.join(f'{k} {v}' for k, v in versions.items())}",
    ]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gibibytes() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def sections(text: str) -> dict[str, str]:
    """What stands in a file of results: under the name of each script its section, under "" what comes before."""
    first, *others = text.split("\n## ")
    return {"": first} | {other.partition("benchmarks.")[2].partition("`")[0]: f"## {other}" for other in others}


def write_results(measured: list[str]) -> None:
    """The results with new sections for these scripts; those of others stay, and the new ones say when they were measured."""
    kept = {} if set(measured) == set(SCRIPTS) or not RESULTS.is_file() else sections(RESULTS.read_text())
    parts = [
        kept[""].strip() if kept else "\n".join(["# Benchmarks", "", *(f"* {line}" for line in machine()), "", HEAD])
    ]
    for name in SCRIPTS:
        if name in measured:
            rows = json.loads((FOLDER / f"{name}.json").read_text())
            assert not rows["quick"], f"the rows of {name} come from a smoke test; run it without --quick"
            when = f"Measured {datetime.datetime.now(datetime.UTC):%Y-%m-%d} on {_cpu()}, {torch.get_num_threads()} threads.\n\n"
            title = f"## {rows['title']} (`python -m benchmarks.{name}`)"
            parts.append(f"{title}\n\n{when if kept else ''}{table(rows['rows'])}")
        elif name in kept:
            parts.append(kept[name].strip())
    RESULTS.write_text("\n\n".join(parts) + "\n")


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
    write_results([name for name in names if name not in failed])
    print(f"written: {RESULTS}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
