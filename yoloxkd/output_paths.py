"""Check that no output of a command is one of its inputs, before anything is written."""

from __future__ import annotations

import os
import stat
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from yoloxkd.errors import UserError

RUN_RECORDS = (
    "recipe.yaml",
    "environment.json",
    "train.log",
    "last.pt",
    "best.pt",
    "results.csv",
    "learning_rate.csv",
    "metrics.json",
    "report.html",
)
"""What a training run keeps in its folder; no other command writes under these names there."""
_JSON_STARTS = tuple(
    f"{start}".encode() for start in ("[]", '[\n  {\n    "image', '{\n  "model": ', '{\n  "data": ', '{"data": ')
)
_HEAD = 256


def is_own_json(file: Path) -> bool:
    """Whether a file begins as the results do that commands write by --json, --coco and into val's and stats' folders."""
    return head(file).startswith(_JSON_STARTS)


def head(file: Path) -> bytes:
    """The first bytes of a file; nothing where it cannot be read."""
    try:
        with open(file, "rb") as stream:
            return stream.read(_HEAD)
    except OSError:
        return b""


@dataclass(frozen=True, slots=True)
class Output:
    """A file that a command is about to write.

    option       how the user asked for it, such as "--json"
    may_replace  whether an existing file there is one that this program wrote, and so may be replaced; None: any may
    record       it is a record of the run whose folder it goes to
    blank        an empty file there says something too, as labels of an image without an object do, and is not replaced
    """

    option: str
    path: Path
    may_replace: Callable[[Path], bool] | None = is_own_json
    record: bool = False
    blank: bool = False

    def __str__(self) -> str:
        return f"{self.option} {self.path}"


def check_outputs(outputs: Sequence[Output], inputs: Iterable[str | Path]) -> None:
    """UserError where an output is an input, another output, a file of the user, a run's record, or cannot be written.

    inputs  every file that the command reads; what is not there is left out
    Files are compared as the file system has them, so through links of both kinds, `..` and other spellings; names that
    are not there yet, without regard to case and Unicode form, because some file systems take those for one.
    """
    outputs_by_key: dict[str | tuple[int, int], Output] = {}
    outputs_by_id: dict[tuple[int, int], Output] = {}
    for output in outputs:
        if is_device(output.path):
            continue
        file_id = _identity(output.path)
        keys: list[str | tuple[int, int]] = [folded(output.path)]
        for key in keys if file_id is None else [*keys, file_id]:
            if outputs_by_key.setdefault(key, output) is not output:
                raise UserError(f"{outputs_by_key[key]} and {output} are the same file; give one of them another name")
        if file_id is not None:
            outputs_by_id[file_id] = output
    for path in inputs if outputs_by_id else ():
        file_id = _identity(path)
        if file_id is not None and file_id in outputs_by_id:
            alias = "" if str(path) == str(outputs_by_id[file_id].path) else f" ({path})"
            raise UserError(f"{outputs_by_id[file_id]} is a file that this command reads{alias}; give another name")
    folders: dict[Path, Output] = {}
    for output in outputs:
        _check_place(output)
        if not is_device(output.path):
            folders.setdefault(Path(os.path.realpath(output.path)).parent, output)
    for folder, output in folders.items():
        check_folder(folder, output.path)


def folded(path: str | Path) -> str:
    """A path as a file system without case and with one Unicode form sees it, links and `..` followed."""
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def is_device(path: Path) -> bool:
    """Whether a path is a pipe, a terminal, /dev/null and the like, which are written to and never replaced."""
    if not os.path.exists(path) or os.path.isdir(path):
        return False
    return not os.path.isfile(path) or path.absolute().parts[1:2] in (("dev",), ("proc",))


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Device and number of a regular file; None: there is none. A device such as /dev/null is nobody's data.

    `..` is followed as it will be once the folders before it are made.
    """
    try:
        status = os.stat(os.path.realpath(path))
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _check_place(output: Output) -> None:
    path = Path(os.path.realpath(output.path))
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"could not write {output.path}: {error.strerror}") from error
    if path.is_dir():
        raise UserError(f"{output} is a folder; give a file name")
    run_files = [name for name in ("recipe.yaml", "last.pt") if (path.parent / name).is_file()]
    if path.name in RUN_RECORDS and run_files and not output.record:
        raise UserError(
            f"{output} is a record of the run in {path.parent}, which has a {run_files[0]}; give another folder or name"
        )
    has_content = path.is_file() and (output.blank or path.stat().st_size)
    if has_content and output.may_replace is not None and not output.may_replace(path):
        raise UserError(
            f"{output} is there already and this command did not write it so, therefore it is not replaced; give another name, "
            "or move that file away"
        )


def check_folder(folder: Path, what: Path | None = None) -> None:
    """UserError: the folder cannot be made or written to. `what` is what is to be written there; None: the folder itself."""
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    try:
        if not existing.is_dir():
            raise NotADirectoryError(0, f"{existing} is not a folder")
        with tempfile.TemporaryFile(dir=existing):  # root may write anywhere but where nothing can be made
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"could not write {folder if what is None else what}: {reason} (is {existing} a folder that can be "
            "written to?)"
        ) from error
