"""The callbacks of a run, in the order in which each event calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console

from yoloxkd.config.load import leaves, shown, validate, write_yaml
from yoloxkd.config.recipe import Recipe
from yoloxkd.config.strict import Strict
from yoloxkd.engine.callbacks import CALLBACKS
from yoloxkd.engine.callbacks.checkpoints import Checkpoints
from yoloxkd.engine.callbacks.csv_log import CsvLog
from yoloxkd.engine.callbacks.final_metrics import FinalMetrics
from yoloxkd.engine.callbacks.finite import FiniteGuard
from yoloxkd.engine.callbacks.progress import ProgressReport
from yoloxkd.engine.callbacks.run_folder import RunFolder
from yoloxkd.engine.events import Callback
from yoloxkd.errors import UserError


def callback_keys() -> list[str]:
    """Dotted names of every key of the recipe's `callbacks` section."""
    return [key for name, kind in CALLBACKS.items() for key in leaves(kind.Config, f"callbacks.{name}.")]


def check_callbacks(section: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, Strict | Literal[False]]:
    """The `callbacks` section, parsed, with every default filled in; False for one that is switched off.

    section  {callback: its keys, true or nothing for the defaults, false for off}
    allowed  dotted keys of the whole recipe, to suggest from
    UserError: an unknown callback or key, or a value that does not fit.
    """
    for name, keys in section.items():
        CALLBACKS.find(name, " in the recipe")
        if not (keys is None or isinstance(keys, Mapping | bool)):
            raise UserError(
                f"key 'callbacks.{name}' in the recipe should be a section (key: value lines), true or false, got "
                f"{shown(keys)}"
            )
    out: dict[str, Strict | Literal[False]] = {}
    for name, kind in CALLBACKS.items():
        keys = section.get(name, kind.default)
        if keys is not False:
            values = keys if isinstance(keys, Mapping) else {}
            out[name] = validate(kind.Config, values, f"recipe ({name})", allowed, f"callbacks.{name}.")
        elif name in section:
            out[name] = False
    return out


def check_objects(callbacks: Any) -> list[Callback]:
    """The user's own callbacks. UserError: they are no list, or one is no object with the events of `Callback`."""
    if not isinstance(callbacks, list | tuple):
        raise UserError(f"callbacks should be a list of callback objects, got {callbacks!r}")
    for one in callbacks:
        if isinstance(one, type) or not all(
            hasattr(type(one), name) for name in vars(Callback) if not name.startswith("_")
        ):
            hint = f" (an object of it is made by {one.__name__}())" if isinstance(one, type) else ""
            raise UserError(f"callbacks should be objects of classes made from yoloxkd's Callback, got {one!r}{hint}")
    return list(callbacks)


def ordered_callbacks(
    recipe: Recipe,
    header: dict[str, Any],
    first: Sequence[Callback],
    callbacks: Sequence[Callback],
    console: Console,
) -> list[Callback]:
    """Every callback of a run (the order and its reasons: `engine.events`).

    header  what identifies the student in its checkpoints
    first   those that come before the guards, such as the distillation
    given   objects of the user; one of a class in `CALLBACKS` stands in for the recipe's
    """
    by_name: dict[str, Callback] = {}
    for name, kind in CALLBACKS.items():
        objects = [c for c in callbacks if type(c) is kind]
        config = recipe.callbacks.get(name, False)
        if objects:
            by_name[name] = objects[-1]
        elif config is not False:
            by_name[name] = kind(config)
    others = [c for c in callbacks if type(c) not in CALLBACKS.values()]

    def named(*names: str) -> list[Callback]:
        return [by_name[name] for name in names if name in by_name]

    return [
        RunFolder(write_yaml(recipe.model_dump(by_alias=True, mode="json"))),
        *first,
        FiniteGuard(recipe.engine.max_nonfinite),
        *named("early_stopping"),
        *others,
        *named("learning_rate", "kd_gradients"),
        CsvLog(),
        ProgressReport(console),
        Checkpoints(header),
        *named("plots", "tensorboard", "wandb", "report"),
        FinalMetrics(),
    ]
