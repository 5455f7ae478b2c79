"""Find the image files of a split: in folders, listed in text files, or by names without suffix."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from yoloxkd.data.io.text_files import decode_text, lines_of
from yoloxkd.data.io.threads import in_threads
from yoloxkd.data.problems import Faults, Place
from yoloxkd.errors import UserError

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".mpo",
)  # fmt: skip
_NOT_DATA = frozenset({"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN"})  # what systems leave in folders
_LONGEST_PATH = 4096
LOST_LINKS = "folders of images left out, whose links are text files now"
OTHER_SPELLING = "images found under another spelling of their name"


def images_of(places: Sequence[Path], root: Path, faults: Faults | None = None) -> list[str]:
    """Image files of folders (with all below, sorted) and of list files (`.txt`, a path a line), in that order.

    A listed path starts at the list's own folder when it begins with "./", else at `root`, else at the list's folder.
    Linked folders are followed, each once. Hidden files and folders are left out, unless a place itself is one.
    `faults` counts listed names that were found under another spelling.
    UserError: a place does not exist or holds no image.
    """
    faults = Faults() if faults is None else faults
    paths: list[str] = []
    for place in places:
        if place.is_dir():
            broken_links: list[Place] = []
            here = sorted(_walk(place, broken_links))
            faults.add(LOST_LINKS, broken_links)
        elif place.suffix.lower() == ".txt" and place.is_file():
            here = locate(_listed_paths(place, root), faults)
        elif is_image(place.name) and place.is_file():
            here = [str(place)]
        else:
            raise UserError(f"there is no image folder or list file {place}; correct the data YAML")
        if not here:
            raise UserError(f"there is no image in {place} (looked for {', '.join(IMAGE_SUFFIXES)})")
        paths += here
    return paths


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image: by its suffix, and not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _walk(top: Path, broken_links: list[Place]) -> Iterator[str]:
    """Image files in and below a folder, each folder once; a link to a folder that it lies in is not followed.

    `broken_links` gets the links to folders that are text files instead, as Git and archives leave on some systems.
    """
    entered: set[str] = set()
    inside, links = [str(top)], list[str]()
    while inside or links:
        folder = inside.pop() if inside else links.pop(0)  # links last, so that a folder is met under its own name
        real = os.path.realpath(folder)
        around = os.path.realpath(os.path.dirname(os.path.abspath(folder))) + os.sep
        if real in entered or (folder != str(top) and around.startswith(real.rstrip(os.sep) + os.sep)):
            continue
        entered.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read the image folder {folder}: {error.strerror or error}") from error
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _NOT_DATA:
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else inside).append(entry.path)
            elif is_image(entry.name) and (entry.is_file() or not os.path.exists(entry.path)):
                yield entry.path  # a broken link too: the check names it
            elif "." not in entry.name and (target := _link_in_text(entry)):
                broken_links.append(Place(entry.path, note=f"should be a link to {target}"))


def _link_in_text(entry: os.DirEntry[str]) -> str:
    """The folder that a text file names in place of a link, or nothing."""
    try:
        if not entry.is_file() or entry.stat().st_size > _LONGEST_PATH:
            return ""
        with open(entry.path, "rb") as file:
            target = os.fsdecode(file.read())
        return target if os.path.isdir(os.path.join(os.path.dirname(entry.path), target)) else ""
    except (OSError, ValueError):
        return ""


def read_lines(file: Path) -> list[str]:
    """Lines of a text file that hold more than spaces, with the spaces around them. UserError: it cannot be read."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    return [line for line in lines_of(decode_text(content, f"the list {file}")) if line.strip()]


def _listed_paths(file: Path, root: Path) -> list[str]:
    out = []
    for line in read_lines(file):
        bases = (file.parent,) if line.strip().startswith("./") else (root, file.parent)
        names = dict.fromkeys((line, line.strip(), line.strip().strip("\"'")))
        paths = [str(base / name) for name in names for base in bases]
        out.append(next((path for path in paths if os.path.lexists(path)), str(bases[0] / line.strip())))
    return out


def locate(paths: Iterable[str], faults: Faults) -> list[str]:
    """The paths, each as it is spelled on disk where only the spelling differs; such are counted in `faults`.

    Other spellings are: the other Unicode normal form, another case, backslashes for slashes, `%20` and the like,
    `file://`, spaces around the name. A path that no file has stays as it is.
    """
    out = [_encodable(path) for path in paths]
    there = in_threads(os.path.lexists, out)
    folders: dict[str, Names] = {}
    for i, path in enumerate(out):
        if not there[i] and (other := _other_spelling(path, folders)):
            faults.add(OTHER_SPELLING, [Place(other, note=f"listed as {path}")])
            out[i] = other
    return out


def _encodable(path: str) -> str:
    """The path itself if a file can have it; else one that no file has, so that it is told as missing."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        path = path.encode("utf-8", "replace").decode()
    return path.replace("\0", "?")


def _other_spelling(path: str, folders: dict[str, Names]) -> str | None:
    slashes = path.replace("\\", "/")
    guesses = [path, slashes, unquote(path), unquote(slashes)]
    for mark in ("file://", "file:/"):
        if mark in path:
            guesses.append(unquote("/" + path.split(mark, 1)[1].lstrip("/")))
    folder, _, name = path.rpartition("/")
    guesses.append(f"{folder}/{name.strip()}")
    for guess in dict.fromkeys(guesses):
        if guess != path and os.path.exists(guess):
            return guess
        parent, name = os.path.split(guess)
        if parent not in folders:
            folders[parent] = Names(parent)
        same = folders[parent].like(name)
        if len(same) == 1:
            return os.path.join(parent, same[0])
    return None


def labels_folder(folder: Path) -> Path:
    """Where the labels of a folder's images are: the last `images` of its path is `labels`, as Ultralytics has it."""
    parts = list(folder.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def missing(path: str) -> str:
    """Why there is no such file, and what in its name may be the reason."""
    if os.path.islink(path):
        return f"is a link to {os.readlink(path)}, which is missing"
    if "\\" in path:
        return "is missing (its name holds backslashes, which separate no folders here: write '/')"
    if "file://" in path or "file:/" in path:
        return "is missing (write a path in place of the URL 'file://')"
    if unquote(path) != path:
        return "is missing (its name holds '%' codes as in a URL: write the characters themselves)"
    return "is missing"


def folded(name: str) -> str:
    """What names have in common that differ in case or Unicode normal form alone."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


class Names:
    """The files of one folder by their names; empty where there is no such folder."""

    def __init__(self, folder: str | Path) -> None:
        try:
            self.names = sorted(os.listdir(folder))
        except OSError:
            self.names = []
        self._like: dict[str, list[str]] = {}
        for name in self.names:
            self._like.setdefault(folded(name), []).append(name)

    def like(self, name: str) -> list[str]:
        """Names that differ from this one in case or Unicode normal form at most."""
        return self._like.get(folded(name), [])


class Stems:
    """Files of one kind by their names without suffix, folder by folder as they are asked for."""

    def __init__(self, suffixes: tuple[str, ...]) -> None:
        self.suffixes = suffixes
        self._folders: dict[str, tuple[dict[str, list[str]], dict[str, list[str]]]] = {}

    def of(self, folder: str, stem: str) -> list[str]:
        """Paths of the files with exactly this stem, else with one that differs in case or normal form alone.

        Suffixes count in any case. Empty: there is none. `stem` may start with folders.
        """
        folder, stem = os.path.split(os.path.join(folder, stem))
        if folder not in self._folders:
            exact: dict[str, list[str]] = {}
            like: dict[str, list[str]] = {}
            for name in Names(folder).names:
                start, suffix = os.path.splitext(name)
                if suffix.lower() in self.suffixes and not name.startswith("._"):
                    exact.setdefault(start, []).append(os.path.join(folder, name))
                    like.setdefault(folded(start), []).append(os.path.join(folder, name))
            self._folders[folder] = exact, like
        exact, like = self._folders[folder]
        return exact.get(stem) or like.get(folded(stem), [])


def beside(images: Sequence[tuple[str, str]], suffix: str) -> list[str]:
    """The file of each image's (folder, stem) with a suffix, for labels and annotations; where there is none, its name.

    A file whose stem differs in case or normal form alone is taken if it is the only one and no other image's.
    UserError: two files of one folder differ in the case of their suffix alone.
    """
    stems = Stems((suffix,))
    out: list[str] = []
    guessed: list[int] = []
    for i, (folder, stem) in enumerate(images):
        expected = os.path.join(folder, stem) + suffix
        candidates = stems.of(folder, stem)
        exact = [path for path in candidates if os.path.splitext(path)[0] == os.path.join(folder, stem)]
        if len(exact) > 1 and expected not in exact:
            raise UserError(f"{exact[0]} and {exact[1]} are both of the image '{stem}'; remove one of them")
        if candidates and not exact:
            guessed.append(i)
        out.append(expected if expected in exact or not exact else exact[0])
    used = set(out)
    for i in guessed:
        candidates = [path for path in stems.of(*images[i]) if path not in used]
        if len(candidates) == 1:
            out[i] = candidates[0]
            used.add(candidates[0])
    return out
