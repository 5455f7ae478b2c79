"""Peak of live tensors in one training step on the CPU, MiB: `python -m benchmarks.peak_memory MODE SIZE IMAGES BOXES`."""

from __future__ import annotations

import json
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.scenes import batch_of, detector
from benchmarks.steps import turn

MIB = 2**20


def high_water(step: object) -> float:
    """The most bytes that a call held at once over what was held before it, from the allocator's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()  # type: ignore[operator]
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / MIB


def main() -> None:
    mode, size, images, boxes = sys.argv[1], *map(int, sys.argv[2:5])
    batch = batch_of(images, boxes, size)
    step = turn(mode, "yolox-nano", "yolox-tiny", batch)
    step()
    found = {"peak": high_water(step), "teacher": 0.0, "maps": 0.0}
    if mode != "step":
        teacher = detector("yolox-tiny", 1).eval()
        found["teacher"] = sum(t.nbytes for t in teacher.state_dict().values()) / MIB
        taps = ("features",) if mode == "fgd" else ("cls_features", "reg_features")
        with torch.no_grad():
            outs = [m(batch.images) for m in (teacher, detector("yolox-nano").eval())]
        found["maps"] = sum(m.nbytes for out in outs for tap in taps for m in getattr(out, tap)) / MIB
    print(json.dumps(found))


if __name__ == "__main__":
    main()
