"""Cache folders: published weights, the built-in data set, decoded images."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

from yoloxkd.errors import UserError

LIBRARIES = {
    "MPLCONFIGDIR": ("XDG_CONFIG_HOME", ".config", "matplotlib", True),
    "HF_HOME": ("XDG_CACHE_HOME", ".cache", "huggingface", False),
    "TORCH_HOME": ("XDG_CACHE_HOME", ".cache", "torch", False),
}
"""Variable of a library -> the variable of the folder above its own, that folder below the home, its own name, and whether
it complains when it cannot write there (the others only read what is there)."""

_announced: set[Path] = set()


def cache_folder() -> Path:
    """Where new files are kept: $YOLOXKD_HOME, else yoloxkd in $XDG_CACHE_HOME or ~/.cache, else in the temporary folder.

    The last where there is no home folder that can be written to. Nothing is made here.
    """
    home_setting = os.environ.get("YOLOXKD_HOME")
    if home_setting:
        return expand(home_setting)
    usual = _usual()
    return usual if usual is not None and can_write(usual) else _temporary()


def find_cached(name: str) -> Path:
    """The file or folder of that name where it is kept, else where it would be; a home that is read-only counts as well."""
    usual = None if os.environ.get("YOLOXKD_HOME") else _usual()
    if usual is not None and os.path.exists(usual / name):
        return usual / name
    return cache_folder() / name


def make_cache_folder(name: str = "") -> Path:
    """`cache_folder()`, or the folder `name` in it, made if it is not there; a temporary one is said once, on stderr.

    UserError: it cannot be made or written to.
    """
    top = cache_folder()
    temporary = not os.environ.get("YOLOXKD_HOME") and top != _usual()
    try:
        if temporary:
            _make_private(top)
        folder = top / name
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {top / name} ({error.strerror or error}); set YOLOXKD_HOME to one that can be "
            "written"
        ) from error
    if not can_write(folder):
        raise UserError(f"the cache folder {folder} cannot be written to; set YOLOXKD_HOME to one that can")
    if temporary and top not in _announced:
        _announced.add(top)
        print(
            f"note: there is no home folder that can be written to, so files are kept in {top}; set HOME or YOLOXKD_HOME "
            "to keep them elsewhere",
            file=sys.stderr,
            flush=True,
        )
    return folder


def expand(path: str | Path) -> Path:
    """A path with `~` replaced by the home folder. UserError: there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        if os.path.exists(path):
            return Path(path)
        raise UserError(
            f"{path}: the home folder that ~ stands for is not known; set HOME, or give a full path"
        ) from error


def can_write(folder: Path) -> bool:
    """Whether files can be written into a folder, or into the nearest one above it that is there."""
    nearest = next((f for f in (folder, *folder.absolute().parents) if os.path.lexists(f)), None)
    return nearest is not None and os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)


def settle_libraries() -> None:
    """Where the home folder cannot be used, point libraries that keep files there to our temporary folder instead.

    Without it matplotlib complains on the screen, and the hub's client makes a folder called `~`. To be called before
    they are imported; the user's own settings win.
    """
    home = _home()
    for variable, (above, below, name, writes) in LIBRARIES.items():
        base = os.environ.get(above) or (str(home / below) if home is not None else "")
        folder = Path(base) / name
        if variable in os.environ or (base and (can_write(folder) or (os.path.isdir(folder) and not writes))):
            continue
        try:
            top = _temporary()
            _make_private(top)
            (top / name).mkdir(exist_ok=True)
        except (OSError, UserError):  # nothing can be written anywhere; each library says what it misses
            return
        os.environ[variable] = str(top / name)


def _home() -> Path | None:
    """The user's home folder; None: it is not known, or not there."""
    if os.environ.get("HOME") == "":
        return None
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() and os.path.isdir(home) else None


def _usual() -> Path | None:
    """Where files are kept unless the user says otherwise; None without a home folder."""
    xdg_cache_home = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg_cache_home):
        return Path(xdg_cache_home) / "yoloxkd"
    home = _home()
    return None if home is None else home / ".cache" / "yoloxkd"


def _temporary() -> Path:
    try:
        above = Path(tempfile.gettempdir())
    except OSError as error:
        raise UserError(
            "neither a home folder nor a temporary folder can be written to; set YOLOXKD_HOME to a folder that can"
        ) from error
    return above / f"yoloxkd-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def _make_private(folder: Path) -> None:
    """Make a folder that only this user can read and write. OSError: somebody else has one of that name."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
        raise OSError("it belongs to another user")
