"""ncnn on the CPU, where it is installed: `pip install yoloxkd[ncnn]`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yoloxkd.errors import UserError
from yoloxkd.exporters.file_description import read_description
from yoloxkd.file_kinds import parts_of


class NcnnSession:
    """A `runtime.Session` of `x.param` with the files beside it. UserError: ncnn is not installed, or cannot load them.

    threads None: half of the cores. Its threads spin while they wait: beside one other program on a core, two threads took YOLOX-nano
    2,900 ms an image, and one 31.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        try:
            import ncnn
        except ImportError as error:
            raise UserError("ncnn is not installed: pip install 'yoloxkd[ncnn]'") from error
        if path.suffix != ".param":
            raise UserError(f"{path} holds an ncnn model; name it X.param, with X.bin and X.metadata.json beside it")
        param, weights, note = parts_of(path)
        for file in (weights, note):
            if not file.is_file():
                raise UserError(f"{path} lacks {file.name} beside it; copy all files of the export together")
        description = read_description(note.read_bytes(), path)
        self.metadata, self.outputs, self._path = description.metadata, description.outputs, path
        self._ncnn, self._net = ncnn, ncnn.Net()
        self._net.opt.num_threads = threads or max(1, (os.cpu_count() or 1) // 2)
        # load_param goes on after an unknown layer, and then gives empty outputs
        loaded = self._net.load_param(str(param)) == 0 and self._net.load_model(str(weights)) == 0
        if not loaded or len(self._net.output_names()) != len(self.outputs):
            raise UserError(
                f"{path} is not a model that ncnn can load with {weights.name}; export the checkpoint again"
            )

    def run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        pixels = np.ascontiguousarray(images[0])  # ncnn reads this memory, and does not own it
        with self._net.create_extractor() as extractor:
            extractor.input("in0", self._ncnn.Mat(pixels))
            return [self._output(extractor, f"out{i}") for i in range(len(self.outputs))]

    def _output(self, extractor: object, name: str) -> np.ndarray:
        status, made = extractor.extract(name)  # type: ignore[attr-defined]
        if status != 0:
            raise UserError(f"{self._path}: ncnn could not compute its output {name}; export the checkpoint again")
        return np.array(made, np.float32)[None]
