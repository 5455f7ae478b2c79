"""Read a data YAML as a mapping, with class names as they are typed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from yoloxkd.data.formats.values import has_control
from yoloxkd.data.problems import shown
from yoloxkd.errors import UserError

_TEXT, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"
_SPLIT_OF = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "eval": "val",
    "evaluation": "val",
    "testing": "test",
}
_PATHS = ("path", "train", "val", "test", *_SPLIT_OF)
_FLAT_KEYS = ("path", "train", "val", "test", "names", "nc", "format", "download", "kpt_shape", *_SPLIT_OF)
_ELSEWHERE = ("minival", "date", "task", "data", "type", "size", "tags", "author", "name", "notes", "trainval")
"""Keys of other programs' data YAMLs that look like one of ours and are none."""


class _AsTyped(yaml.SafeLoader):
    """A safe loader that leaves class names and paths alone: to YAML, `no` is false, `1.10` is 1.1 and `12:30` is 750."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node)
            for key, value in node.value:
                if key.value == "names" and not isinstance(value, yaml.ScalarNode):
                    _keep_texts(value, nothing=True)
                elif key.value in _PATHS:
                    _keep_texts(value, nothing=False)
        return node


def _keep_texts(node: yaml.Node, nothing: bool) -> None:
    """Take the scalars of a node as texts; `nothing`: also `null` and `~`, which are class names but no paths."""
    values = [node]
    if isinstance(node, yaml.SequenceNode):
        values = list(node.value)
    elif isinstance(node, yaml.MappingNode):
        _refuse_twice(node)
        values = [value for _, value in node.value]
        if not nothing:
            values += [item for value in values if isinstance(value, yaml.SequenceNode) for item in value.value]
    for value in values:
        if isinstance(value, yaml.ScalarNode) and (nothing or value.tag != _NULL):
            value.tag = _TEXT


def _refuse_twice(node: yaml.MappingNode) -> None:
    """YAML keeps the last value of a key that is there twice, and the user loses the first."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _Twice(f"the key '{shown(key.value)}' is there twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line


class _Twice(ValueError):
    pass


def read_data_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a data YAML; the items of `names` are texts, as typed, and splits have our keys.

    UserError: the file cannot be read, is no YAML, no mapping, or has a key twice.
    """
    try:
        value = yaml.load(file.read_text(encoding="utf-8-sig"), Loader=_AsTyped)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except _Twice as error:
        raise UserError(f"{file}: {error}; remove one of them") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{file} is not valid YAML: {shown(str(error), 300)}") from error
    except RecursionError as error:
        raise UserError(f"{file} is not valid YAML: it is nested too deeply") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} should hold a YAML mapping (key: value lines), found {type(value).__name__}")
    return _our_splits({shown(str(key)): one for key, one in value.items()}, file)


def _our_splits(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """`valid` and the like as `val`."""
    out: dict[str, Any] = {}
    key_of_split: dict[str, str] = {}
    for key, value in content.items():
        split = _SPLIT_OF.get(key, key)
        if value is not None and out.get(split) is not None:
            raise UserError(
                f"{file} has '{key_of_split[split]}' and '{key}', which mean the same split; remove one of them"
            )
        if value is not None or split not in out:
            out[split], key_of_split[split] = value, key
    return out


def refuse_typing_errors(content: Mapping[str, Any], where: str) -> None:
    """Of a YAML whose unknown keys may be another program's: one that is nearly one of ours is a typing error."""
    for key in content:
        if key in _FLAT_KEYS or key.lower() in _ELSEWHERE or "_" in key:
            continue
        if close := difflib.get_close_matches(key.lower(), _FLAT_KEYS, n=1, cutoff=0.75):
            raise UserError(f"unknown key '{key}' in the {where}; did you mean '{close[0]}'?")


def class_names(value: Any) -> list[str]:
    """Names in label order from a list, or a mapping index -> name. ValueError: they are none; the message says why."""
    if isinstance(value, Mapping):
        places = {int(k) if isinstance(k, str) and k.isdecimal() else k: name for k, name in value.items()}
        if len(places) < len(value) or set(places) != set(range(len(value))) or any(type(k) is bool for k in places):
            raise ValueError(f"as a mapping should have the indices 0 to {max(len(value) - 1, 0)}")
        value = [places[index] for index in range(len(places))]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("should be a list of class names")
    return [_class_name(name, place) for place, name in enumerate(value)]


def _class_name(name: Any, place: int) -> str:
    if type(name) is int:
        return str(name)
    if not isinstance(name, str):
        raise ValueError(f"should hold texts, and name {place} is none")
    if not name.strip():
        raise ValueError(f"should hold names, and name {place} is empty")
    if has_control(name) or name.encode(errors="ignore").decode() != name:
        raise ValueError(f"should hold names without control characters, and name {place} has one")
    return name
