"""Memory of a device: available, and peak use."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from yoloxkd.engine.heap import give_back
from yoloxkd.errors import UserError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMORY = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


class Memory:
    """Of a CUDA device as torch's allocator reserves it; on the CPU the resident memory of this process (Linux).

    available  bytes that this process may still fill, when constructed; `sharers` processes share the machine's
    """

    def __init__(self, device: torch.device, sharers: int = 1) -> None:
        self.device = device
        self.free()  # what earlier runs left must not be counted as in use now and given back later
        if device.type == "cuda":
            self.start = torch.cuda.memory_reserved(device)
            self.available = torch.cuda.mem_get_info(device)[0]
        else:
            self.start = _resident("VmRSS")
            self.available = _free() // sharers

    def restart(self) -> None:
        """Forget the highest so far."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _CLEAR.write_text("5")

    def free(self) -> None:
        """Give back what trial steps held: models and their hooks refer to each other, so only the collector frees them."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            give_back()

    def peak(self) -> int:
        """Bytes above the start, at the highest since `restart`; 0 where less is in use than then."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_reserved(self.device) - self.start
        return max(0, _resident("VmHWM") - self.start)


def _kilobytes(file: Path, name: str) -> int | None:
    try:
        for line in file.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    except OSError:
        pass
    return None


def _resident(name: str) -> int:
    size = _kilobytes(_STATUS, name)
    if size is None:
        raise UserError("batch auto measures CPU memory by /proc, which this system does not have; give --batch N")
    return size * 1024


def _free() -> int:
    """Available memory of the machine, or of the control group this process lives in when that is less."""
    available = (_kilobytes(_MEMORY, "MemAvailable") or 0) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            available = min(available, int((_GROUP / limit).read_text()) - int((_GROUP / used).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(available, 0)
