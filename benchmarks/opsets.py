"""Which versions of ONNX Runtime read each variant of an export, by opset, and give the outputs of the installed one.

python -m benchmarks.opsets [FOLDER ...]      each made by: pip install --no-deps --target FOLDER onnxruntime==VERSION
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from yoloxkd.config.quantization import Quantization
from yoloxkd.exporters.int8 import Int8Quantizer
from yoloxkd.exporters.onnx import OPSETS, ExportOptions, described_graph, without_probes
from yoloxkd.nn.dense.yolox import YOLOX

SIZE = 64
CONF = 0.001  # low, so that a network with random weights detects something
CHECK = """
import json, sys
import numpy, onnxruntime
found = {}
for name in sys.argv[1:]:
    pixels = numpy.load("images.npy")
    try:
        session = onnxruntime.InferenceSession(name + ".onnx", providers=["CPUExecutionProvider"])
        outputs = session.run(None, {"images": pixels})
        wanted = numpy.load(name + ".npz")
        tolerance = 0.5 if "int8" in name else 2e-2 if "fp16" in name else 1e-3
        near = all(numpy.abs(a - wanted[k]).max() < tolerance * max(1, numpy.abs(wanted[k]).max())
                   for k, a in zip(wanted.files, outputs))
        found[name] = "yes" if near else "other numbers"
    except Exception as error:
        found[name] = type(error).__name__ + ": " + str(error).splitlines()[0][:120]
print(json.dumps([onnxruntime.__version__, found]))
"""


def graphs(opset: int, detector: YOLOX, images: np.ndarray) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The variants of one opset by name."""
    options = {"imgsz": SIZE, "opset": opset, "conf": CONF}
    yield "fp32", described_graph(detector, ExportOptions(**options))
    yield "fp16", described_graph(detector, ExportOptions(**options, half=True))
    raw = described_graph(detector, ExportOptions(**options, nms=False, raw=True))
    yield "raw", raw
    yield "int8 raw", Int8Quantizer(raw, [images], Quantization()).make()


def main(folders: Sequence[str]) -> None:
    import onnxruntime

    torch.manual_seed(0)
    detector = YOLOX(YOLOX.Config(depth=0.33, width=0.25, depthwise=True), ["a", "b", "c"]).eval()
    images = np.random.default_rng(0).uniform(0, 255, (1, 3, SIZE, SIZE)).astype(np.float32)
    rows: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "images.npy", images)
        for opset in OPSETS:
            for variant, graph in graphs(opset, detector, images):
                file = f"{opset} {variant}"
                onnx.save(without_probes(graph), folder / f"{file}.onnx")
                rows[file] = {}
                session = onnxruntime.InferenceSession(folder / f"{file}.onnx", providers=["CPUExecutionProvider"])
                names = [output.name for output in session.get_outputs()]
                outputs = session.run(names, {"images": images})
                np.savez(folder / f"{file}.npz", **dict(zip(names, outputs, strict=True)))
        for place in ["", *folders]:
            path = os.pathsep.join([os.path.abspath(place), os.environ.get("PYTHONPATH", "")]) if place else None
            environment = os.environ | ({"PYTHONPATH": path} if path else {})
            done = subprocess.run(
                [sys.executable, "-c", CHECK, *rows],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                print(f"{place}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            version, found = json.loads(done.stdout.strip().splitlines()[-1])
            for file, said in found.items():
                rows[file][version] = said
    versions = sorted({v for row in rows.values() for v in row}, key=lambda v: [int(n) for n in v.split(".")])
    print("| opset, variant | " + " | ".join(versions) + " |\n|" + "---|" * (1 + len(versions)))
    for file, row in rows.items():
        print(f"| {file} | " + " | ".join(row.get(v, "") for v in versions) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
