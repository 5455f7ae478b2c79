"""ExecuTorch with XNNPACK on the CPU, where it is installed: `pip install yoloxkd[executorch]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from yoloxkd.errors import UserError
from yoloxkd.exporters.file_description import archived_description


class ExecuTorchSession:
    """A `runtime.Session` of a `.pte`. `threads` are those of the whole process from then on.

    UserError: ExecuTorch is not installed, or cannot read the file.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        try:
            from executorch.extension.pybindings.portable_lib import (
                _threadpool_get_thread_count,
                _unsafe_reset_threadpool,
            )
            from executorch.runtime import Runtime
        except ImportError as error:
            raise UserError("ExecuTorch is not installed: pip install 'yoloxkd[executorch]'") from error
        if threads not in (None, _threadpool_get_thread_count()):
            _unsafe_reset_threadpool(threads)
        try:
            self._program = Runtime.get().load_program(path)
            self._method = self._program.load_method("forward")
        except Exception as error:  # RuntimeError, KeyError and others, as the fault may be
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise UserError(f"{path} is not a program that ExecuTorch can load: {reason}") from error
        description = archived_description(path)
        self.metadata, self.outputs = description.metadata, description.outputs
        if self._method.metadata.num_outputs() != len(self.outputs):
            raise UserError(f"{path} has other outputs than its metadata promises; export the checkpoint again")

    def run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        results = self._method.execute([torch.from_numpy(images)])
        return [result.numpy().copy() for result in results]  # they are its own memory, which the next call overwrites
