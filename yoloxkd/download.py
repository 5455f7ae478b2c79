"""Download published files: resumable, verified, atomic."""

from __future__ import annotations

import contextlib
import hashlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from yoloxkd.cache_folders import find_cached, make_cache_folder
from yoloxkd.errors import UserError


@dataclass(frozen=True, slots=True)
class Published:
    """One published file.

    url, filename  where it is, and its name in the folder it is kept in
    size           bytes, where they are known
    sha256, md5    hex digest (or its beginning), where one is known; a download is checked against it
    """

    url: str
    filename: str
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None


CHUNK = 1 << 18
TIMEOUT = 30  # seconds without an answer


def fetch(published: Published, cache_dir: Path | None = None) -> Path:
    """The local file of something published, in `cache_dir` (default: `find_cached`), downloaded when it is not there.

    A file of that name put into the folder by hand is used, after the same checks of size and digest. The download goes
    to `<filename>.part`, continues there after an interruption, and gets its name only when it is complete and right.
    Raises UserError when there is no connection, no such file, or the wrong bytes came.
    """
    target = find_cached(published.filename) if cache_dir is None else cache_dir / published.filename
    if target.is_file():
        _check(target, published, f"delete {target} to have it downloaded again")
        return target
    folder = make_cache_folder() if cache_dir is None else _make_folder(cache_dir)
    target, part = folder / published.filename, folder / f"{published.filename}.part"
    with _alone(folder / f"{published.filename}.lock"):
        if not target.is_file():  # else another process has downloaded it meanwhile
            _fetch(published, target, part)
    return target


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Within: no other process downloads the same file. No waiting where the system or the disk has no locks."""
    try:
        import fcntl

        file = lock.open("w")
    except (ImportError, OSError):  # what must be written there says so itself
        yield
        return
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


def _fetch(published: Published, target: Path, part: Path) -> None:
    try:
        _download(published, part)
    except urllib.error.HTTPError as error:
        raise UserError(
            f"{published.url} answered {error.code} {error.reason}; get the file another way and put it at {target}"
        ) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise UserError(
            f"cannot download {published.url} ({reason}); try again when online, or put the file at {target}"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write {part}: {error.strerror or error}; set YOLOXKD_HOME to another folder"
        ) from error
    try:
        _check(part, published, "try again")
    except UserError:
        part.unlink()
        raise
    part.replace(target)


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror})") from error
    return folder


def _download(published: Published, part: Path) -> None:
    """Bring `part` to its full length, continuing from what it holds when the server can."""
    received = part.stat().st_size if part.exists() else 0
    try:
        response = _open(published.url, received)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not received:
            raise
        received = 0  # the server has nothing after our bytes: they may be all, or of another file
        response = _open(published.url, 0)
    with response:
        continues = response.status == 206 and _first_byte(response) == received
        if response.status == 206 and not continues:
            raise HTTPException("the server sent another part of the file than the one asked for")
        received = received if continues else 0
        length = response.headers.get("Content-Length")
        total = received + int(length) if length and length.isdigit() else None
        size = _write(response, part, received, total, published.filename)
    if total is not None and size != total:
        raise UserError(
            f"the download of {published.url} stopped after {size} of {total} bytes; run the command again to "
            "continue it"
        )


def _open(url: str, start: int) -> HTTPResponse:
    headers = {"User-Agent": "yoloxkd"} | ({"Range": f"bytes={start}-"} if start else {})
    response: HTTPResponse = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    return response


def _first_byte(response: HTTPResponse) -> int | None:
    """Where a partial answer starts, from `Content-Range: bytes 100-199/200`."""
    start = response.headers.get("Content-Range", "").removeprefix("bytes").strip().partition("-")[0]
    return int(start) if start.isdigit() else None


def _write(response: HTTPResponse, part: Path, received: int, total: int | None, name: str) -> int:
    """Append the answer to `part` (or start it anew when `received` is 0); the number of bytes it then holds."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        part.open("ab" if received else "wb") as file,
    ):
        task = progress.add_task(name, total=total, completed=received)
        while block := response.read(CHUNK):
            file.write(block)
            received += len(block)
            progress.update(task, completed=received)
    return received


def _check(file: Path, published: Published, remedy: str) -> None:
    """Size and digest, as far as they are known."""
    size = file.stat().st_size
    if published.size is not None and size != published.size:
        raise UserError(f"{file} has {size} bytes instead of {published.size}; {remedy}")
    for kind, published_digest in (("sha256", published.sha256), ("md5", published.md5)):
        if published_digest is not None:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, kind).hexdigest()
            if not digest.startswith(published_digest):
                raise UserError(f"{file} has the {kind} {digest} instead of {published_digest}; {remedy}")
