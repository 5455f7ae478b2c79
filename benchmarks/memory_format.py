"""A training step with maps in NHWC against one in NCHW, which is what `engine.channels_last: auto` decides by."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.report import Row, run_script
from benchmarks.scenes import batch_of
from benchmarks.scenes import detector as build
from benchmarks.steps_of import training_step
from benchmarks.timing import alternate, ratio
from yoloxkd.nn import DETECTORS

STEPS = {
    "yolox-nano": 8,
    "yolox-s": 4,
    "fcos-mobilenetv2": 2,
    "gfl-mobilenetv2": 2,
    "fcos-r50": 2,
    "faster-rcnn-r50": 2,
}
"""Detector -> images a step."""


def measure(quick: bool) -> Iterator[Row]:
    size, rounds = (64, 1) if quick else (320, 4)
    names = ("yolox-nano", "fcos-mobilenetv2") if quick else tuple(STEPS)
    for name in names:
        images = 1 if quick else STEPS[name]
        kind = DETECTORS[max((family for family in DETECTORS if name.startswith(family)), key=len)]
        best = kind.channels_last_on_cpu
        weights = {} if name.startswith("yolox") else {"backbone_weights": "none"}
        turns = {
            layout: training_step(build(name, **weights), batch_of(images, 8, size), channels_last=layout == "NHWC")
            for layout in ("NHWC", "NCHW")
        }
        samples = alternate(turns, rounds, warmup=0 if quick else 1)
        chosen, other = ("NHWC", "NCHW") if best else ("NCHW", "NHWC")
        yield Row(
            f"a step in {other} / in {chosen}, which auto chooses, {name}, {size} px, {images} images",
            *ratio(samples[other], samples[chosen]),
            note=f"{samples[other].milliseconds} / {samples[chosen].milliseconds}",
        )


if __name__ == "__main__":
    run_script("memory_format", "NHWC and NCHW in a training step", measure)
