"""A long run by hand: `python -m tests.fuzz --tries 5000 --seed 1 [--only NAME ...]`, from the repository's root.

First every kind of file is used unchanged, which must be a success. Then the tries go round the kinds. Prints every
fault (an exception other than UserError, what is not one line, a try of over 30 seconds of processor time) with the mutation
and the options that repeat it, and a row a kind. Exit status 1 when there was one.
"""

from __future__ import annotations

import argparse
import collections
import resource
import sys
import time
import traceback

from tests.fuzz.harness import Outcome, attempt
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=list(TARGETS))
    options = parser.parse_args()
    names = options.only or list(TARGETS)
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in names}
    unchanged = [attempt(name, TARGETS[name], None) for name in names]
    slowest = 0.0
    for number in range(options.tries):
        name, seed = names[number % len(names)], options.seed + number // len(names)
        began = time.process_time()
        outcome = attempt(name, TARGETS[name], seed)
        slowest = max(slowest, time.process_time() - began)
        counts[name][outcome.end] += 1
        _say(outcome)
    for name, found in counts.items():
        print(f"{name:20} {found['success']:6} success {found['sentence']:6} sentence {found['fault']:6} fault")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{options.tries} tries, seed {options.seed}; slowest {slowest:.1f} s; most memory {memory:.1f} GB")
    for outcome in unchanged:
        _say(outcome)
    return int(any(found["fault"] for found in counts.values()) or any(o.end != "success" for o in unchanged))


def _say(outcome: Outcome) -> None:
    if outcome.end == "fault":
        print(outcome, flush=True)
        traceback.print_exception(outcome.error, limit=-3, file=sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
