"""Fetching published weights, against a server on this machine."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from yoloxkd.download import Published, fetch
from yoloxkd.errors import UserError

CONTENT = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT at /x.pth.

    ranges   answer Range requests with a part
    breaks   send only half of what the header announces, this many times
    content  the bytes
    pause    seconds in the middle of an answer
    seen     the Range header of each request
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = True
        self.breaks = 0
        self.pause = 0.0
        self.content = CONTENT
        self.seen: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/x.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.seen.append(wanted)
        body, start = self.server.content, 0
        if self.path != "/x.pth":
            self.send_error(404)
            return
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        body = body[start:]
        if self.server.breaks:
            self.server.breaks -= 1
            body = body[: len(body) // 2]
        half = len(body) // 2
        self.wfile.write(body[:half])
        time.sleep(self.server.pause)
        self.wfile.write(body[half:])

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as server:
        yield server


def published(server: Server, size: int | None = None, sha256: str | None = None) -> Published:
    return Published(server.url, "x.pth", size, sha256)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_download_and_reuse(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "cache"
    file = fetch(published(server, len(CONTENT), DIGEST), folder)
    assert file == folder / "x.pth"
    assert file.read_bytes() == CONTENT
    assert left(folder) == ["x.pth"]
    assert fetch(published(server, len(CONTENT), DIGEST), folder) == file
    assert len(server.seen) == 1


def test_a_file_put_there_by_hand_is_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"mine")
    assert fetch(published(server), tmp_path).read_bytes() == b"mine"
    assert server.seen == []


@pytest.mark.parametrize(("size", "sha256"), [(5, None), (None, DIGEST)])
def test_a_wrong_file_put_there_by_hand_is_refused_and_kept(
    server: Server, tmp_path: Path, size: int | None, sha256: str | None
) -> None:
    (tmp_path / "x.pth").write_bytes(b"mine")
    with pytest.raises(UserError, match="delete"):
        fetch(published(server, size, sha256), tmp_path)
    assert (tmp_path / "x.pth").read_bytes() == b"mine"


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_is_continued(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.breaks, server.ranges = 1, ranges
    with pytest.raises(UserError, match=f"stopped after {len(CONTENT) // 2} of {len(CONTENT)} bytes"):
        fetch(published(server), tmp_path)
    assert left(tmp_path) == ["x.pth.part"]
    file = fetch(published(server, len(CONTENT), DIGEST), tmp_path)
    assert file.read_bytes() == CONTENT
    assert left(tmp_path) == ["x.pth"]
    assert server.seen == [None, f"bytes={len(CONTENT) // 2}-"]


def test_a_part_that_is_too_long_is_started_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "x.pth.part").write_bytes(CONTENT + b"more")
    assert fetch(published(server, sha256=DIGEST), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(("size", "sha256"), [(len(CONTENT) + 1, None), (None, "0" * 64)])
def test_wrong_bytes_are_refused_and_removed(
    server: Server, tmp_path: Path, size: int | None, sha256: str | None
) -> None:
    with pytest.raises(UserError, match="instead of"):
        fetch(published(server, size, sha256), tmp_path)
    assert left(tmp_path) == []


def test_a_missing_file_says_where_to_put_it(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="404") as caught:
        fetch(Published(server.url + "x", "y.pth"), tmp_path)
    assert str(tmp_path / "y.pth") in str(caught.value)
    assert left(tmp_path) == []


def test_offline_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        closed = server.url
    with pytest.raises(UserError, match="cannot download") as caught:
        fetch(Published(closed, "x.pth"), tmp_path)
    assert str(tmp_path / "x.pth") in str(caught.value)
    assert left(tmp_path) == []


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        fetch(published(server), tmp_path / "file" / "cache")
    monkeypatch.setenv("YOLOXKD_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(UserError, match="YOLOXKD_HOME"):
        fetch(published(server))


def test_two_commands_at_once_get_one_file(server: Server, tmp_path: Path) -> None:
    """The second one waits, and finds what the first has downloaded."""
    script = f"""
from pathlib import Path
from yoloxkd.download import Published, fetch
print(fetch(Published({server.url!r}, "x.pth", None, {DIGEST!r}), Path({str(tmp_path)!r})))
"""
    server.pause = 2.0
    both = [subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert left(tmp_path) == ["x.pth"]
    assert len(server.seen) == 1
