"""Lines of `yoloxkd doctor`: what an issue report needs of this machine, without personal paths."""

from __future__ import annotations

import os
import re
import shutil
from importlib import metadata
from pathlib import Path

import torch

from yoloxkd.cache_folders import LIBRARIES, cache_folder, can_write
from yoloxkd.cli.versions import version_lines, version_of
from yoloxkd.data.io.image_caches import available_memory
from yoloxkd.engine.device import available_cores

SHARED_MEMORY = Path("/dev/shm")
_FOR_DEVELOPERS = ("dev", "docs")


def doctor_lines() -> list[str]:
    """Versions, devices, memory, shared memory, threads, extras and cache folders, a line each."""
    return [
        *version_lines(),
        *_devices(),
        f"memory {_gigabytes(available_memory())} available",
        f"shared memory {_shared_memory()}",
        f"threads {torch.get_num_threads()} of torch, {available_cores()} cores, "
        f"OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}",
        *(f"extra {name}: {packages}" for name, packages in _extras().items()),
        f"cache yoloxkd {_folder(cache_folder())}",
        *(f"cache {name} {_folder(folder)}" for name, folder in _library_folders().items()),
    ]


def without_home(path: Path) -> str:
    """A path with the home folder as `~`."""
    try:
        return str(Path("~") / path.absolute().relative_to(Path.home()))
    except (ValueError, RuntimeError):  # elsewhere, or no home
        return str(path)


def _devices() -> list[str]:
    lines = [f"device cpu: {torch.backends.cpu.get_cpu_capability()}"]
    if not torch.cuda.is_available():
        built = f"torch is built for {torch.version.cuda}" if torch.version.cuda else "torch is built without it"
        return [*lines, f"device cuda: none ({built})"]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        lines.append(
            f"device cuda {index}: {about.name}, {_gigabytes(about.total_memory)}, compute capability "
            f"{about.major}.{about.minor}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    return lines


def _shared_memory() -> str:
    """What loader processes pass batches through: the system's own, where it is a folder."""
    if not SHARED_MEMORY.is_dir():
        return "not a folder on this system"
    usage = shutil.disk_usage(SHARED_MEMORY)
    return f"{_gigabytes(usage.free)} free of {_gigabytes(usage.total)}"


def _extras() -> dict[str, str]:
    """Optional dependency group -> its packages with their versions."""
    extras: dict[str, list[str]] = {}
    for requirement in metadata.requires("yoloxkd") or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if name and extra and extra[1] not in _FOR_DEVELOPERS:
            extras.setdefault(extra[1], []).append(f"{name[0]} {version_of(name[0])}")
    return {extra: ", ".join(packages) for extra, packages in extras.items()}


def _library_folders() -> dict[str, Path]:
    """The folders of the libraries that keep files, as they look for them."""
    folders = {}
    for variable, (above, below, name, _) in LIBRARIES.items():
        base = os.environ.get(above) or str(Path("~") / below)
        folders[name] = Path(os.environ.get(variable) or Path(base) / name).expanduser()
    return folders


def _folder(folder: Path) -> str:
    state = "" if can_write(folder) else ", cannot be written to"
    return without_home(folder) + (state or ("" if folder.is_dir() else ", not there yet"))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
