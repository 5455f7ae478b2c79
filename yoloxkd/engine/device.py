"""Device of a run: every branch that depends on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from yoloxkd.config.recipe import EngineSection
from yoloxkd.distributed.comm import local_ranks, world_size
from yoloxkd.engine.heap import kept_heap
from yoloxkd.errors import UserError, nearest
from yoloxkd.nn.backbones.timm_backbone import TimmBackbone
from yoloxkd.nn.detector import Detector

MOST_WORKERS = 12
"""Loader processes that "auto" chooses at most: at some 114 mosaics of 640 px a second each they make 1,400."""
CPU_WORKERS = 2
"""Those beside a CPU, which the training itself keeps busy."""
KNOWN = ("auto", "cpu", "cuda", "0")
"""Ways to name a device; 0 stands for any CUDA index."""


class SeveralDevices(UserError):
    """Several devices are asked for, and this process is alone: the command line starts one process for each."""

    def __init__(self, devices: list[str]) -> None:
        self.devices = devices
        n = len(devices)
        super().__init__(
            f"device '{','.join(devices)}' names {n} devices, and each needs a process of its own; on the command line "
            f"they are started for you, from Python start the script with: torchrun --nproc-per-node {n} SCRIPT"
        )


def choose_device(name: str) -> torch.device:
    """The device of this process: "auto" -> CUDA when there is one; "0" -> cuda:0; "0,1" -> one for each process.

    With several processes on a machine, "auto" and "cuda" give each its own CUDA device.
    """
    names = [part.strip() for part in name.split(",")]
    here = local_ranks()
    if len(names) > 1:
        if world_size() == 1:
            raise SeveralDevices(names)
        if len(names) != here.local_world_size:
            raise UserError(
                f"device '{name}' names {len(names)} devices for {here.local_world_size} processes of this machine"
            )
        return _one(names[here.local_rank])
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if here.local_world_size > 1 and name == "cuda":
        return _one(str(here.local_rank))
    if here.local_world_size > 1 and name != "cpu":
        raise UserError(
            f"device '{name}' is one device for {here.local_world_size} processes; name one for each, or cuda"
        )
    return _one(name)


def _one(name: str) -> torch.device:
    try:
        device = torch.device(f"cuda:{name}" if name.isdigit() else name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}'; {nearest(name, KNOWN)}") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"a device of type '{device.type}' cannot be used here; {nearest(name, KNOWN)}")
    if not torch.cuda.is_available():
        raise UserError(f"device '{name}' asks for CUDA, and torch finds none here; use --device cpu")
    if device.index is None:  # torch.cuda.set_device refuses a device without one
        device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
    if device.index >= torch.cuda.device_count():
        raise UserError(f"there is no device {device}: torch finds {torch.cuda.device_count()} CUDA device(s) here")
    return device


def loader_workers(workers: int | str, device: torch.device) -> int:
    """Loader processes of this process. "auto": beside a GPU as many as it has cores, at most `MOST_WORKERS`; else 2."""
    if isinstance(workers, int):
        return workers
    if device.type != "cuda":
        return CPU_WORKERS
    return max(1, min(MOST_WORKERS, available_cores() // local_ranks().local_world_size))


def available_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolved_amp(amp: str, device: torch.device) -> str:
    """What "auto" stands for: bf16 on a GPU that computes with it, fp16 on an older one, off on the CPU."""
    if amp != "auto":
        return amp
    if device.type != "cuda":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of a name; None: full precision. UserError: fp16 without CUDA, bf16 on a GPU without it."""
    amp = resolved_amp(amp, device)
    if amp == "fp16" and device.type != "cuda":
        raise UserError("engine.amp fp16 needs a CUDA device; use bf16 or off on the CPU")
    if amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"engine.amp bf16 needs a GPU of the Ampere generation or newer, and {device} is older; use fp16"
        )
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def grad_scaler(amp: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler | None:
    """float16 gradients underflow without one."""
    return torch.amp.GradScaler(device.type) if amp is torch.float16 else None


def memory_format(
    channels_last: bool | Literal["auto"], detector: Detector[Any, Any], device: torch.device
) -> torch.memory_format:
    """That of a run's weights and maps. "auto": channels_last, but beside a CPU what is faster for the detector's family."""
    if channels_last == "auto":
        channels_last = device.type != "cpu" or detector.channels_last_on_cpu
    return torch.channels_last if channels_last else torch.contiguous_format


def folds_norms(device: torch.device) -> bool:
    """Whether the batch norms of what never trains are folded: on CUDA; on the CPU it would gain 3 % and change results' last digits."""
    return device.type == "cuda"


def fused_optimizer(device: torch.device) -> bool | None:
    """The optimizer's `fused`: on CUDA one kernel for all parameters; None: torch's own choice."""
    return True if device.type == "cuda" else None


def tries_largest_size(device: torch.device) -> bool:
    """Whether a step at the largest size is tried before the first one: where its memory is asked for at once, and may be missing."""
    return device.type == "cuda"


def synchronized_norms(detector: nn.Module, device: torch.device) -> None:
    """Batch norms that take their statistics over all processes, in place. UserError: not on CUDA."""
    if device.type != "cuda":
        raise UserError("engine.sync_bn needs CUDA: torch synchronizes batch norms there only; leave it off")
    if world_size() > 1:
        convert_norms(detector)


def convert_norms(detector: nn.Module) -> None:
    """Replace every batch norm by a `SyncBatchNorm`; what is frozen stays frozen.

    By timm's converter: timm's norms hold their activation, and torch's converter drops it (pytorch/pytorch#187298).
    """
    from timm.layers import convert_sync_batchnorm

    convert_sync_batchnorm(detector)
    for module in detector.modules():
        if isinstance(module, TimmBackbone):
            module.freeze_again()


@contextmanager
def settings(engine: EngineSection, device: torch.device, *, few_sizes: bool = False) -> Iterator[None]:
    """The process-wide switches of a run, put back afterwards.

    tf32 is for CUDA's convolutions; matrix products stay float32, since assigners and losses use them. With few_sizes of
    inputs cuDNN times its algorithms for each, unless the results should be deterministic. On the CPU freed memory is kept.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    # the call alone imports torch's compiler, two seconds
    switches = engine.deterministic and not torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        cudnn.allow_tf32 = engine.tf32
        cudnn.benchmark = few_sizes and not engine.deterministic
        if engine.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
            cudnn.deterministic = True
    if switches:
        torch.use_deterministic_algorithms(True)
    try:
        with kept_heap() if device.type == "cpu" else nullcontext():
            yield
    finally:
        if switches:
            torch.use_deterministic_algorithms(False)
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before
