"""Provenance of a run for `environment.json`: versions, git state, command, machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from yoloxkd.config.load import shown
from yoloxkd.errors import UserError
from yoloxkd.version import __version__

PACKAGES = (
    "torch", "torchvision", "numpy", "opencv-python-headless", "albumentations", "timm", "pycocotools", "hotcoco",
    "onnx", "onnxruntime", "pydantic", "PyYAML", "matplotlib", "rich", "tensorboard", "wandb",
)  # fmt: skip
_CHECKED = ConfigDict(strict=True, extra="allow")
_REMEDY = "put the file back as it was, or move it away to begin a new one"
GIT_SECONDS = 5.0
"""How long git may take: a huge repository on a slow disk must not hold a run up."""


def provenance(device: torch.device) -> dict[str, Any]:
    """Everything about here and now that a result may depend on.

    yoloxkd, python, torch, packages   versions; a package that is not installed is left out
    command, folder, git               what was typed, where, and the state of the repository there (None: there is none)
    host, system, machine, processor   the computer
    device, device_name, cuda, cudnn   where tensors are
    cores, threads                     processors this process may use, and torch's threads
    started                            local time with its offset, ISO 8601
    """
    cuda = device.type == "cuda"
    return {
        "yoloxkd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": _versions(),
        "command": shlex.join(sys.argv),
        "folder": str(Path.cwd()),
        "git": git_state(Path.cwd()),
        "host": platform.node(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "started": now(),
    }


class _Git(BaseModel):
    model_config = _CHECKED
    commit: str
    branch: str | None = None
    changed: list[str] | None = None


class _Resumed(BaseModel):
    model_config = _CHECKED
    started: str
    epoch: int


class Environment(BaseModel):
    """An `environment.json`, as far as it is read again: what `provenance` says, of the first start and of each resume."""

    model_config = _CHECKED
    packages: dict[str, str | None] = {}
    git: _Git | None = None
    resumed: list[_Resumed] = []


def read_environment(file: Path) -> Environment:
    """UserError: it cannot be read, or was changed to something else."""
    try:
        return Environment.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except ValidationError as error:  # a ValueError too
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        what = f"its '{key}' holds {shown(fault['input'])}" if key else "it is no JSON object"
        raise UserError(f"{file} was changed or is damaged: {what}; {_REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}; {_REMEDY}") from error


def now() -> str:
    """Local time with its offset, ISO 8601, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def git_state(folder: Path) -> dict[str, Any] | None:
    """{commit, branch, changed} of the repository a folder lies in, or None; `changed` are the paths git status names.

    Remote addresses are left out: they may hold passwords.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain")
    return {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "changed": None if changed is None else [line[3:] for line in changed.splitlines()],
    }


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):  # no git, no repository, too slow
        return None
    return done.stdout.rstrip()


def _versions() -> dict[str, str]:
    out = {}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def _processor() -> str:
    """The processor's name; platform knows it on few systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
