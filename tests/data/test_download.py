"""`yoloxkd data download` against a server on this machine: fetched, checked, unpacked, continued, refused."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.test_convert import rich_set
from tests.test_download import Server, serving
from yoloxkd.cli import run
from yoloxkd.data import download
from yoloxkd.data.download import download_data, unpack
from yoloxkd.download import Published
from yoloxkd.errors import UserError


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return out.getvalue()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serves a data set in the layout of `coco`, with one tiny split."""
    source = tmp_path / "source"
    rich_set(source)
    files = {f"train2017/{p.name}": p.read_bytes() for p in (source / "train").iterdir()}
    files["annotations/instances_train2017.json"] = (source / "train.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch) as server:
        server.content = zipped(files)
        archive = Published(server.url, "set.zip", len(server.content), md5=hashlib.md5(server.content).hexdigest())
        monkeypatch.setattr(download, "ARCHIVES", {"coco": (archive,)})
        yield server


def test_a_set_comes_into_the_layout_of_its_yaml(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "download", "coco"]) == 0
    folder = tmp_path / "datasets" / "coco"
    assert sorted(p.name for p in folder.iterdir()) == [".set.zip.unpacked", "annotations", "train2017"]
    assert "use it with --data coco" in capsys.readouterr().out
    assert len(list((folder / "train2017").iterdir())) == 4
    assert run(["data", "download", "coco"]) == 0
    assert len(server.seen) == 1


def test_an_interrupted_download_continues_and_the_archive_may_stay(server: Server, tmp_path: Path) -> None:
    server.breaks = 1
    with pytest.raises(UserError, match="run the command again to continue"):
        download_data("coco", keep=True, say=str)
    folder = download_data("coco", keep=True, say=str)
    assert server.seen == [None, f"bytes={len(server.content) // 2}-"]
    assert (folder / "set.zip").read_bytes() == server.content


def test_wrong_bytes_are_refused(server: Server, tmp_path: Path) -> None:
    server.content = server.content[:-1] + b"x"
    with pytest.raises(UserError, match=r"md5 .* instead of"):
        download_data("coco", say=str)
    assert not (tmp_path / "datasets" / "coco").exists()


def test_offline_says_where_to_put_the_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = Published("http://127.0.0.1:9/x.zip", "set.zip", None)
    monkeypatch.setattr(download, "ARCHIVES", {"coco": (closed,)})
    assert run(["data", "download", "coco"]) == 2
    assert f"put the file at {tmp_path / 'datasets' / 'coco' / 'set.zip'}" in capsys.readouterr().err
    assert not (tmp_path / "datasets" / "coco").exists()
    (tmp_path / "datasets" / "coco").mkdir()
    (tmp_path / "datasets" / "coco" / "set.zip").write_bytes(server.content)
    download_data("coco", say=str)
    assert (tmp_path / "datasets" / "coco" / "train2017" / "0.png").is_file()


def test_what_no_program_may_fetch_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["data", "download", "crowdhuman"]) == 2
    assert "www.crowdhuman.org" in capsys.readouterr().err
    assert run(["data", "download", "cocoo"]) == 2
    assert "did you mean 'coco'" in capsys.readouterr().err


def test_too_little_room_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    huge = Published("http://127.0.0.1:9/x.zip", "x.zip", 10**17)
    monkeypatch.setattr(download, "ARCHIVES", {"coco": (huge,)})
    with pytest.raises(UserError, match=r"need 200000000\.0 GB"):
        download_data("coco", say=str)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_archives_are_unpacked_whole(tmp_path: Path, pack: object) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(pack({"a/b.txt": b"one", "c.txt": b"two"}))  # type: ignore[operator]
    assert unpack(file, tmp_path / "out") == 2
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")) == [
        "a",
        "a/b.txt",
        "c.txt",
    ]
    assert (tmp_path / "out" / "a" / "b.txt").read_bytes() == b"one"


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize(
    "name", ["../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:\\evil.txt", "."]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, pack: object, name: str) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(pack({"good.txt": b"x", name: b"x"}))  # type: ignore[operator]
    with pytest.raises(UserError, match="leads out of its folder"):
        unpack(file, tmp_path / "out" / "deep")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil.txt").exists()


def test_a_broken_archive_is_said(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"neither zip nor tar")
    with pytest.raises(UserError, match="not a whole archive"):
        unpack(file, tmp_path / "out")
