"""A long run by hand: `python -m tests.fuzz --tries 5000 --seed 1 [--only NAME ...]`, from the repository's root.

Prints a row a kind of file, and every fault (an exception other than UserError, a sentence of several lines, a try of over
30 seconds of processor time, which ends the run) with the number that repeats it: `--only NAME --seed S --tries 1`. Exit status 1 when there was one.
"""

from __future__ import annotations

import argparse
import collections
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType

from tests.fuzz.targets import TARGETS, attempt

SECONDS = 30


class TooLongError(BaseException):
    """Ends the run: code that takes an Exception for something else does not take this one."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=list(TARGETS))
    options = parser.parse_args()
    names = options.only or list(TARGETS)
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in names}
    slowest = 0.0
    signal.signal(signal.SIGPROF, _too_long)
    for name in names:
        TARGETS[name].base()  # made once, outside the first try's time
    for number in range(options.tries):
        name, seed = names[number % len(names)], options.seed + number // len(names)
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            said, end, fault = attempt(name, seed, Path(folder))
            signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.monotonic() - began)
        counts[name][end] += 1
        if end == "fault":
            print(f"{name} --seed {seed}: {said}")
            traceback.print_exception(fault, limit=-3, file=sys.stdout)
    for name, found in counts.items():
        print(f"{name:20} {found['success']:6} success {found['sentence']:6} sentence {found['fault']:6} fault")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{options.tries} tries, seed {options.seed}; slowest {slowest:.1f} s; most memory {memory:.1f} GB")
    return int(any(found["fault"] for found in counts.values()))


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLongError(f"a try took over {SECONDS} s of processor time")


if __name__ == "__main__":
    sys.exit(main())
