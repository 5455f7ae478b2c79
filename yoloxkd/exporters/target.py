"""Check that an export replaces nothing but an export."""

from __future__ import annotations

from pathlib import Path

from yoloxkd.errors import UserError
from yoloxkd.file_kinds import EXPORTED, is_content_of, is_own_export, parity_note, parts_of
from yoloxkd.output_paths import Output, check_outputs, head


def export_target(path: str | Path | None, source: str, weights: Path, kind: str = "onnx") -> Path:
    """The file to export to: the one given, else beside its source. Looked at before any work is done.

    source   what the user called the model
    weights  the file it was read from
    kind     the format, a key of `EXPORTED`
    UserError: the name does not end as the format's do, is the checkpoint itself, or has a file that is not of the format
    (where nobody gave the name: that this program did not export).
    """
    ending = EXPORTED[kind]
    target = Path(source).with_suffix(ending) if path is None else Path(path)
    if target.suffix.lower() != ending and not target.is_dir():
        raise UserError(f"--output {target} should be a file name that ends in {ending}")

    def replaceable(_: Path) -> bool:
        return is_own_export(target) if path is None else is_content_of(target, kind)

    files = [Output("--output" if file == target else "its part", file, replaceable) for file in parts_of(target)]
    note = Output("the parity report", parity_note(target), is_parity_note)
    check_outputs([*files, note], [weights])
    return target


def is_parity_note(file: Path) -> bool:
    """Whether a file begins as the report beside an exported file does."""
    return head(file).startswith(b'{\n  "passed": ')
