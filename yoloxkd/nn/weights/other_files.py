"""Explain what a file is that was given as a checkpoint and is none."""

from __future__ import annotations

import zipfile
from pathlib import Path

BEGINNINGS = {
    b"\x89HDF": "an HDF5 file (Keras writes such); give the checkpoint of a PyTorch model",
    b"\x1f\x8b": "a gzip archive; unpack it and give the checkpoint in it",
    b"7z\xbc\xaf": "a 7z archive; unpack it and give the checkpoint in it",
    b"Rar!": "a RAR archive; unpack it and give the checkpoint in it",
    b"\xff\xd8\xff": "an image, and a model should come first; give the path of a .pth or .pt file",
    b"\x89PNG": "an image, and a model should come first; give the path of a .pth or .pt file",
    b"version https://git-lfs": "a pointer of Git LFS instead of the file itself; run 'git lfs pull' where it came from",
    b"<": "a web page or XML, not a checkpoint; the download gave this page instead of the file",
}


def what_else(path: Path) -> str | None:
    """The end of the sentence "FILE is ..."; None for what may be a checkpoint."""
    with open(path, "rb") as file:
        start = file.read(64)
    if _is_safetensors(start, path.stat().st_size):
        return (
            "a safetensors file; save its weights as a checkpoint: "
            "torch.save(safetensors.torch.load_file(FILE), 'weights.pth')"
        )
    for beginning, what in BEGINNINGS.items():
        if start.startswith(beginning):
            return what
    return _archive(path) if start.startswith(b"PK") else _text(path)


def _is_safetensors(start: bytes, size: int) -> bool:
    """Eight bytes that say how long the JSON after them is."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def _archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None  # cut or damaged, which torch says
    parts = {name.partition("/")[2] for name in names}
    if "constants.pkl" in parts and any(part.startswith("code/") for part in parts):
        return "a TorchScript file, a program instead of weights; give the checkpoint that it was made from"
    if any(part.startswith(("models/", "serialized_exported_program")) for part in (*parts, *names)):
        return "a program of torch.export instead of weights; give the checkpoint that it was made from"
    if "data.pkl" not in parts and "data.pkl" not in names:
        inside = next((name for name in names if name.endswith((".pt", ".pth"))), None)
        what = f"such as {inside}" if inside else "if there is one"
        return f"a ZIP archive and no checkpoint; unpack it and give the checkpoint in it, {what}"
    return None


def _text(path: Path) -> str | None:
    """Text, as a YAML or a list of names is. A checkpoint begins with bytes that no text has."""
    with open(path, "rb") as file:
        start = file.read(512)
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if not all(c.isprintable() or c in "\r\n\t" for c in text):
        return None
    return "a text file, not a checkpoint; give the path of a .pth or .pt file"
