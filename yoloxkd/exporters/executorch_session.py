"""ExecuTorch on the CPU, where it is installed: `pip install yoloxkd[executorch]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yoloxkd.errors import UserError
from yoloxkd.exporters.file_description import archived_description


class ExecuTorchSession:
    """A `runtime.Session` of a `.pte`. UserError: ExecuTorch is not installed, or cannot read the file.

    Its threads are one pool of the whole process, so that the session made last sets them for all.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        import torch

        try:
            from executorch.runtime import Runtime
        except ImportError as error:
            raise UserError("ExecuTorch is not installed: pip install 'yoloxkd[executorch]'") from error
        if threads is not None:
            from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

            _unsafe_reset_threadpool(threads)
        description = archived_description(path)
        try:
            self._program = Runtime.get().load_program(path)
            self._method = self._program.load_method("forward")
        except Exception as error:  # RuntimeError, and what the binding throws
            raise UserError(f"{path} is not a file that ExecuTorch can open: {error}") from error
        self.metadata, self.outputs, self._tensor = description.metadata, description.outputs, torch.from_numpy

    def run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        results = self._method.execute([self._tensor(images)])
        return [result.numpy().copy() for result in results]  # they are views of the runtime's memory
