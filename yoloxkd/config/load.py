"""Read YAML, apply dotted overrides, and turn every fault into one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from yoloxkd.errors import UserError, hint, nearest

Model = TypeVar("Model", bound=BaseModel)

MOST_VALUES, MOST_DEPTH = 2_000_000, 100
"""Of a YAML file whose aliases are written out; a few lines of aliases can stand for billions of values."""
SHOWN = 80
_TEXT, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping by safe load; anything else is a UserError naming the file."""
    try:
        value = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a YAML mapping (key: value lines), found {type(value).__name__}")
    return value


class _NamesAsTyped(yaml.SafeLoader):
    """A safe loader that leaves class names alone: to YAML, `no` is false, `1.10` is 1.1 and `12:30` is 750."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        node: yaml.Node | None = super().compose_node(parent, index)
        if isinstance(parent, yaml.MappingNode) and isinstance(index, yaml.ScalarNode) and node is not None:
            _keep_names(str(index.value), node)
        return node


def _keep_names(key: str, node: yaml.Node) -> None:
    """Take what `names` or `SECTION.names` holds as texts; `null` for a whole list of names stays nothing."""
    if key.rpartition(".")[2] != "names":
        return
    for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        for name in item.value if isinstance(item, yaml.SequenceNode) else [item]:
            if isinstance(name, yaml.ScalarNode) and (name is not item or name.tag != _NULL):
                name.tag = _TEXT


def _parsed(text: str, key: str = "") -> Any:
    """What a YAML text holds, the value of a dotted key where it is one. ValueError: it is not YAML, or too much of it."""
    try:
        loader = _NamesAsTyped(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _keep_names(key, node)
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
    ) as error:  # those not YAML's: odd tags
        raise ValueError(str(error)) from error
    if not _bounded(value, [MOST_VALUES]):
        raise ValueError(
            f"its aliases repeat, or its lists nest, to more than {MOST_VALUES} values or {MOST_DEPTH} levels"
        )
    return value


def _bounded(value: Any, remaining: list[int], depth: int = 0) -> bool:
    """Whether a value, with every alias written out, is small enough to look through; `remaining` counts down."""
    remaining[0] -= 1
    if remaining[0] < 0 or depth > MOST_DEPTH:
        return False
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | set) else ()
    return all(_bounded(item, remaining, depth + 1) for item in inner)


def write_yaml(value: Mapping[str, Any]) -> str:
    """YAML text with keys in their own order."""
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=110)


def parse_set(text: str) -> tuple[str, Any]:
    """`a.b=value` -> (`a.b`, value read as YAML)."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise UserError(f"--set takes key=value, got {shown(text)}")
    try:
        return key.strip(), _parsed(value, key.strip())
    except ValueError as error:
        raise UserError(f"--set {key}: {shown(value)} is not a value that YAML can read") from error


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


def sections(tree: Mapping[str, Any], model: type[BaseModel], where: str) -> dict[str, Any]:
    """The tree without its empty sections. UserError: something else than a mapping stands where `model` has a section."""
    out = {key: value for key, value in tree.items() if value is not None}
    for name, field in model.model_fields.items():
        kind = field.annotation
        is_section = get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, BaseModel))
        if is_section and not isinstance(out.get(name, {}), Mapping):
            raise UserError(
                f"key '{name}' in the {where} should be a section (key: value lines), got {shown(out[name])}"
            )
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
    model: type[Model], value: Mapping[str, Any], where: str, known_keys: Iterable[str] = (), prefix: str = ""
) -> Model:
    """Check `value` against a typed section; the first fault becomes one UserError sentence.

    where       what is being read, for the sentence ("recipe", "data set x.yaml", ...)
    known_keys  dotted keys to suggest from when a key is unknown; default: those of `model`
    prefix      dotted path of the section within the whole
    """
    if not isinstance(value, Mapping):
        place = f"key '{prefix.rstrip('.')}' in the {where}" if prefix else f"the {where}"
        raise UserError(f"{place} should be a section (key: value lines), got {shown(value)}")
    try:
        return model.model_validate(dict(value))
    except ValidationError as error:
        fault = error.errors()[0]
        # pydantic puts tags such as 'function-after[...]' or union member names into loc; keep what the user typed
        key = prefix + ".".join(str(p) for p in fault["loc"] if not (isinstance(p, str) and "[" in p))
        if fault["type"] == "extra_forbidden":
            names = [*known_keys] or list(leaves(model, prefix))
            names += {name.rpartition(".")[0] for name in names} - {""}  # sections
            raise UserError(f"unknown key '{key}' in the {where}; {nearest(key, names)}") from error
        if fault["type"] == "missing":
            raise UserError(f"the {where} lacks the key '{key}'") from error
        reason = fault["msg"].removeprefix("Value error, ")
        if isinstance(fault["input"], Mapping) and key not in leaves(
            model, prefix
        ):  # a rule about several keys of a section; its sentence names them
            raise UserError(f"the {where}: {reason}") from error
        raise UserError(
            f"key '{key}' in the {where}: {reason[0].lower() + reason[1:]}, got {shown(fault['input'])}{_hint(fault)}"
        ) from error


def _hint(fault: Any) -> str:
    """The value that a misspelt one of a few is nearest to, after the sentence that lists them."""
    if fault["type"] != "literal_error" or not isinstance(fault["input"], str):
        return ""
    return hint(fault["input"], re.findall("'([^']*)'", fault["ctx"]["expected"]))


def shown(value: Any) -> str:
    """A value as a sentence shows it: Python's notation, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; a list in itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."
