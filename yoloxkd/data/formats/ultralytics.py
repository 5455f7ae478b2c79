"""Data YAMLs without a format: Ultralytics' own, and ours where the format is evident."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yoloxkd.cache_folders import expand
from yoloxkd.data.formats.data_yaml import refuse_typing_errors
from yoloxkd.data.formats.values import id_key, typed
from yoloxkd.errors import UserError

_MOST_CLASSES = 1_000_000


def is_flat(content: Mapping[str, Any], splits: Sequence[str]) -> bool:
    """Whether a split is a bare path, or a list of them, as in Ultralytics' YAML."""
    return any(isinstance(content.get(split), str | list) for split in splits)


def from_ultralytics(content: Mapping[str, Any], splits: Sequence[str], where: str, base: Path) -> dict[str, Any]:
    """An Ultralytics data YAML in our keys.

    `train`, `val`, `test` are folders or list files, one or several; `names` a list or a mapping, or `nc` classes without
    names; `path` starts at `base`, else at the working folder or its `datasets`. Its other keys do not concern detection.
    UserError: another format is said, `nc` and `names` disagree, a split is something else.
    """
    refuse_typing_errors(content, where)
    format_name = content.get("format", "yolo")
    flat = [split for split in splits if isinstance(content.get(split), str | list)]
    if format_name != "yolo":
        raise UserError(
            f"the {where} has the format {format_name} and should say "
            f"'{flat[0]}: {{images: FOLDER, annotations: FILE}}', not a bare path"
        )
    path = str(content.get("path") or ".")
    places = [base / expand(path), Path.cwd() / path, Path.cwd() / "datasets" / path]
    root = next((place for place in places if place.is_dir()), places[0])
    out: dict[str, Any] = {"path": str(root), "format": "yolo", "names": _names(content, where)}
    for split in splits:
        value = content.get(split)
        if not value:  # also the empty text, which would be the whole data set's folder
            continue
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise UserError(f"key '{split}' in the {where} should be a folder, a list file or a list of them")
        out[split] = {"images": [_roboflow(name, root) for name in names]}
    if content.get("kpt_shape") is not None:
        out["kpt_shape"] = content["kpt_shape"]
    if isinstance(link := content.get("download"), str):
        out["download"] = f"unpack {link} there" if link.startswith("http") else "run the script in its YAML by hand"
    return out


def _names(content: Mapping[str, Any], where: str) -> Any:
    names, nc = content.get("names"), content.get("nc")
    count = id_key(nc)
    if nc is not None and (not isinstance(count, int) or not 1 <= count <= _MOST_CLASSES):
        raise UserError(f"key 'nc' in the {where} should be a number of classes, got {typed(nc)}")
    if names is None and isinstance(count, int):
        return [f"class{index}" for index in range(count)]
    if count is not None and isinstance(names, list | dict) and len(names) != count:
        raise UserError(f"the {where} says nc {count} and gives {len(names)} names; correct one of them")
    return names


def _roboflow(name: str, root: Path) -> str:
    """Roboflow writes `../train/images` where it means `train/images`."""
    inside = name.removeprefix("../")
    return inside if not (root / name).exists() and (root / inside).exists() else name


def guess_format(content: Mapping[str, Any], splits: Sequence[str]) -> str:
    """The format of a YAML that says none, by its splits' keys and the names of their annotation files."""
    for split in splits:
        files = content.get(split)
        if not isinstance(files, Mapping):
            continue
        if files.get("list"):
            return "voc"
        if files.get("labels") or (files.get("images") and not files.get("annotations")):
            return "yolo"
        annotations = files.get("annotations")
        first = str(annotations[0] if isinstance(annotations, list) and annotations else annotations)
        if first.endswith(".odgt"):
            return "crowdhuman"
        if first.endswith(".json"):
            return "coco"
        if first and "." not in Path(first).name:
            return "voc"
    return "coco"
