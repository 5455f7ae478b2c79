"""YAML in, dotted overrides on top, one clear sentence when something is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from yoloxkd.errors import UserError, nearest

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping by safe load; anything else is a UserError naming the file."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a YAML mapping (key: value lines), found {type(value).__name__}")
    return value


def write_yaml(value: Mapping[str, Any]) -> str:
    """YAML text with keys in their own order."""
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=110)


def parse_set(text: str) -> tuple[str, Any]:
    """`a.b=value` -> (`a.b`, value read as YAML)."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise UserError(f"--set takes key=value, got '{text}'")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {key}: '{value}' is not a value that YAML can read") from error


def put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `tree[a][b][c] = value` for the key `a.b.c`, making the mappings in between."""
    *parents, last = dotted.split(".")
    for name in parents:
        node = tree.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"key '{dotted}': '{name}' is a value, not a section")
        tree = node
    tree[last] = value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A new mapping: `over` wins, mappings are merged key by key."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if both else value
    return out


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of every key of a typed section, nested sections included."""
    for name, field in model.model_fields.items():
        shown = prefix + (field.alias or name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, shown + ".")
        else:
            yield shown


def validate(
    model: type[Model], value: Mapping[str, Any], where: str, known: Iterable[str] = (), prefix: str = ""
) -> Model:
    """Check `value` against a typed section; the first fault becomes one UserError sentence.

    where   what is being read, for the sentence ("recipe", "data set x.yaml", ...)
    known   dotted keys to suggest from when a key is unknown; default: those of `model`
    prefix  dotted path of the section within the whole
    """
    try:
        return model.model_validate(dict(value))
    except ValidationError as error:
        fault = error.errors()[0]
        # pydantic puts tags such as 'function-after[...]' or union member names into loc; keep what the user typed
        key = prefix + ".".join(str(p) for p in fault["loc"] if not (isinstance(p, str) and "[" in p))
        if fault["type"] == "extra_forbidden":
            names = [*known] or list(leaves(model, prefix))
            raise UserError(f"unknown key '{key}' in the {where}; {nearest(key, names)}") from error
        if fault["type"] == "missing":
            raise UserError(f"the {where} lacks the key '{key}'") from error
        reason = fault["msg"].removeprefix("Value error, ")
        if isinstance(fault["input"], Mapping) and key not in leaves(
            model, prefix
        ):  # a rule about several keys of a section; its sentence names them
            raise UserError(f"the {where}: {reason}") from error
        raise UserError(
            f"key '{key}' in the {where}: {reason[0].lower() + reason[1:]}, got {fault['input']!r}"
        ) from error
