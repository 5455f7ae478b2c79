"""Check that an export replaces nothing but an export."""

from __future__ import annotations

from pathlib import Path

from yoloxkd.errors import UserError
from yoloxkd.file_kinds import is_onnx, is_own_onnx
from yoloxkd.output_paths import Output, check_outputs, head


def export_target(path: str | Path | None, source: str, weights: Path) -> Path:
    """The file to export to: the one given, else beside its source. Looked at before any work is done.

    source   what the user called the model
    weights  the file it was read from
    UserError: the name does not end in .onnx, is the checkpoint itself, or has a file that is not ONNX (where nobody gave
    the name: that this program did not export).
    """
    target = Path(source).with_suffix(".onnx") if path is None else Path(path)
    if target.suffix.lower() != ".onnx" and not target.is_dir():
        raise UserError(f"--output {target} should be a file name that ends in .onnx")
    whose = is_own_onnx if path is None else is_onnx
    note = Output("the parity report", target.with_suffix(".parity.json"), is_parity_note)
    check_outputs([Output("--output", target, whose), note], [weights])
    return target


def is_parity_note(file: Path) -> bool:
    """Whether a file begins as the report beside an exported file does."""
    return head(file).startswith(b'{\n  "passed": ')
