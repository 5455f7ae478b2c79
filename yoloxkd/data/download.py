"""Public data sets: download them into the layout of `cfg/data`."""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from yoloxkd.config.files import cfg_folder, cfg_names
from yoloxkd.data.data_spec import read_spec
from yoloxkd.download import Published, fetch
from yoloxkd.errors import UserError, nearest

_COCO = "http://images.cocodataset.org"
_VOC = "http://host.robots.ox.ac.uk/pascal/VOC"

ARCHIVES: dict[str, tuple[Published, ...]] = {
    "coco": (
        Published(
            f"{_COCO}/annotations/annotations_trainval2017.zip",
            "annotations_trainval2017.zip",
            252_907_541,
            md5="f4bbac642086de4f52a3fdda2de5fa2c",
        ),
        Published(f"{_COCO}/zips/val2017.zip", "val2017.zip", 815_585_330, md5="442b8da7639aecaf257c1dceb8ba8c80"),
        Published(
            f"{_COCO}/zips/train2017.zip", "train2017.zip", 19_336_861_798, md5="cced6f7f71b7629ddf16f17bbcfab6b2"
        ),
    ),
    "voc": (
        Published(
            f"{_VOC}/voc2007/VOCtrainval_06-Nov-2007.tar",
            "VOCtrainval_06-Nov-2007.tar",
            md5="c52e279531787c972589f7e41ab4ae64",
        ),
        Published(
            f"{_VOC}/voc2007/VOCtest_06-Nov-2007.tar",
            "VOCtest_06-Nov-2007.tar",
            md5="b6e924de25625d8de591ea690078ad9f",
        ),
        Published(
            f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar",
            "VOCtrainval_11-May-2012.tar",
            md5="6cd6e144f989b92b3379bac3b3de84fd",
        ),
    ),
}
"""Name in `cfg/data` -> its archives, in the order they are fetched."""


def download_data(name: str, keep: bool = False, say: Callable[[str], None] = print) -> Path:
    """Fetch and unpack a data set into the folder its data YAML names; that folder.

    What is there already is not fetched or unpacked again, so the command continues what was interrupted.
    keep  leave the archives beside what came out of them; one that was put there by hand stays anyway
    UserError: the name has no download (the sentence says how to get it by hand), there is no connection, too little
    room, wrong bytes came, an archive would write outside its folder.
    """
    if name not in cfg_names("data"):
        raise UserError(f"unknown data set '{name}'; {nearest(name, cfg_names('data'))}")
    spec = read_spec(cfg_folder() / "data" / f"{name}.yaml", name, Path.cwd())
    folder = Path.cwd() / spec.path
    if name not in ARCHIVES:
        raise UserError(
            f"'{name}' cannot be downloaded by a program; to get it, {' '.join(spec.download.split())} ({folder})"
        )
    there = folder.exists()
    try:
        _bring(ARCHIVES[name], folder, keep, say)
    except UserError:
        if not there:
            with contextlib.suppress(OSError):  # an empty folder would pass for a data set
                folder.rmdir()
        raise
    return folder


def _bring(archives: Sequence[Published], folder: Path, keep: bool, say: Callable[[str], None]) -> None:
    for archive in archives:
        done = folder / f".{archive.filename}.unpacked"
        if done.exists():
            say(f"{archive.filename}: there already")
            continue
        _check_room(folder, archive)
        by_hand = (folder / archive.filename).exists()
        file = fetch(archive, folder)
        say(f"{archive.filename}: {file.stat().st_size / 1e6:.1f} MB, unpacking")
        count = unpack(file, folder)
        done.touch()
        if not (keep or by_hand):
            file.unlink()
        say(f"{archive.filename}: {count} files in {folder}")


def _check_room(folder: Path, archive: Published) -> None:
    """Refuse to start what cannot fit: the archive and, about as large, what comes out of it."""
    if archive.size is None:
        return
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free, needed = shutil.disk_usage(there).free, 2 * archive.size
    if free < needed:
        raise UserError(
            f"{archive.filename} and its contents need {needed / 1e9:.1f} GB and {there} has {free / 1e9:.1f} GB free"
        )


def unpack(archive: Path, folder: Path) -> int:
    """Write the files of a zip or tar archive under `folder`, each under its own name when it is whole; how many.

    A file that is there already with the size it should have is left. UserError: the archive is broken, holds a
    name that leads out of the folder, or one that a file of another size has; nothing of it is written then.
    """
    try:
        with _members(archive) as members:
            for name, size, _ in members:
                _inside(name, archive)
                if (folder / name).exists() and (folder / name).stat().st_size != size:
                    raise UserError(
                        f"{folder / name} is there already and is not the file that {archive} holds; move it away, so "
                        "that it is not lost"
                    )
            for name, size, open_ in members:
                target = folder / name
                if target.is_file() and target.stat().st_size == size:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f".{target.name}.part")
                with open_() as source, part.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
                os.replace(part, target)
            return len(members)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive} is not a whole archive ({error}); delete it and run the command again") from error
    except OSError as error:
        raise UserError(f"cannot unpack {archive} into {folder}: {error.strerror or error}") from error


Member = tuple[str, int, Callable[[], IO[bytes]]]
"""Name, size in bytes, and what opens it."""


@contextmanager
def _members(archive: Path) -> Iterator[list[Member]]:
    """The regular files of an archive; links and devices are left out."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            yield [(i.filename, i.file_size, lambda i=i: file.open(i)) for i in file.infolist() if not i.is_dir()]  # type: ignore[misc]
        return
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isreg()]
        yield [(m.name, m.size, lambda m=m: tar.extractfile(m)) for m in members]  # type: ignore[misc]


def _inside(name: str, archive: Path) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise UserError(f"{archive} holds '{name}', which leads out of its folder; it was not unpacked")
