"""What `--version` and `doctor` say of the installation: versions of packages, read without importing them."""

from __future__ import annotations

import platform
from importlib import metadata

from yoloxkd.version import __version__

MATTER = ("torch", "torchvision", "timm", "onnxruntime")
"""Packages that most faults depend on."""


def version_of(package: str) -> str:
    """The installed version, or `not installed`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def version_lines() -> list[str]:
    """`yoloxkd X`, then a line for each of `MATTER`, for Python and for the platform."""
    packages = [f"{name} {version_of(name)}" for name in MATTER]
    return [
        f"yoloxkd {__version__}",
        *packages,
        f"python {platform.python_version()}",
        f"platform {platform.platform()}",
    ]
