"""The image files of a split: in folders, listed in text files, or by their names without suffix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from yoloxkd.data.images import IMAGE_SUFFIXES
from yoloxkd.errors import UserError


def images_of(places: Sequence[Path], root: Path) -> list[str]:
    """Image files of folders (with all below, sorted) and of list files (`.txt`, a path a line), in that order.

    A listed path starts at the list's own folder when it begins with "./", else at `root`, else at the list's folder.
    UserError: a place does not exist or holds no image.
    """
    found: list[str] = []
    for place in places:
        if place.is_dir():
            here = sorted(str(p) for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        elif place.suffix == ".txt" and place.is_file():
            here = _listed(place, root)
        elif place.suffix.lower() in IMAGE_SUFFIXES and place.is_file():
            here = [str(place)]
        else:
            raise UserError(f"there is no image folder or list file {place}; correct the data YAML")
        if not here:
            raise UserError(f"there is no image in {place} (looked for {', '.join(IMAGE_SUFFIXES)})")
        found += here
    return found


def read_lines(file: Path) -> list[str]:
    """Lines of a text file without the spaces around them. UserError: it cannot be read."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error


def _listed(file: Path, root: Path) -> list[str]:
    out = []
    for line in read_lines(file):
        if not line:
            continue
        if line.startswith("./"):
            out.append(str(file.parent / line[2:]))
        else:
            whole = root / line
            out.append(str(whole if whole.exists() or not (file.parent / line).exists() else file.parent / line))
    return out


def by_stem(folder: Path, stems: Iterable[str]) -> list[str]:
    """The image of each name without suffix in `folder`; where there is none, the name of the JPEG that should be there."""
    try:
        files = {p.name: p for p in folder.iterdir()}
    except OSError as error:
        raise UserError(f"cannot read the image folder {folder}: {error.strerror or error}") from error
    at = {p.stem: str(p) for p in files.values() if p.suffix.lower() in IMAGE_SUFFIXES}
    return [at.get(stem, str(folder / f"{stem}.jpg")) for stem in stems]
