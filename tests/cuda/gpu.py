"""Where the tests of this folder run: on a CUDA device, or not at all.

With YOLOXKD_TEST_DEVICE=cpu they run on the CPU instead. That checks the tests themselves, and nothing else.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("YOLOXKD_TEST_DEVICE", "cuda")
ON_GPU = DEVICE.startswith("cuda")

on_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]
"""What every module of this folder is marked with."""
cuda_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU, and YOLOXKD_TEST_DEVICE names none")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices here")


def full_float32() -> None:
    """No TensorFloat-32 anywhere, so that a GPU's float32 can be compared with the CPU's."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
