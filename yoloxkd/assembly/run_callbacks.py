"""The callbacks of a run, in the order in which each event calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from yoloxkd.config.load import leaves, validate, write_yaml
from yoloxkd.config.recipe import Recipe
from yoloxkd.engine.callbacks import CALLBACKS
from yoloxkd.engine.callbacks.checkpoints import Checkpoints
from yoloxkd.engine.callbacks.csv_log import CsvLog
from yoloxkd.engine.callbacks.final_metrics import FinalMetrics
from yoloxkd.engine.callbacks.finite import FiniteGuard
from yoloxkd.engine.callbacks.progress import ProgressReport
from yoloxkd.engine.callbacks.run_folder import RunFolder
from yoloxkd.engine.events import Callback
from yoloxkd.errors import UserError, nearest


def callback_keys() -> list[str]:
    """Dotted names of every key of the recipe's `callbacks` section."""
    return [key for name, kind in CALLBACKS.items() for key in leaves(kind.Config, f"callbacks.{name}.")]


def check_callbacks(section: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The `callbacks` section with every default filled in; False for one that is switched off.

    UserError: an unknown callback or key, or a value that does not fit.
    """
    for name in section:
        if name not in CALLBACKS:
            raise UserError(f"unknown callback '{name}' in the recipe; {nearest(name, CALLBACKS)}")
    out: dict[str, Any] = {}
    for name, kind in CALLBACKS.items():
        keys = section.get(name, {} if kind.default else False)
        if keys is False:
            if name in section:
                out[name] = False
            continue
        given = keys if isinstance(keys, Mapping) else {}
        checked = validate(kind.Config, given, f"recipe ({name})", known, f"callbacks.{name}.")
        out[name] = checked.model_dump(mode="json")
    return out


def check_objects(given: Any) -> list[Callback]:
    """The user's own callbacks. UserError: they are no list, or one is no object with the events of `Callback`."""
    if not isinstance(given, list | tuple):
        raise UserError(f"callbacks should be a list of callback objects, got {given!r}")
    for one in given:
        if isinstance(one, type) or not all(
            hasattr(type(one), name) for name in vars(Callback) if not name.startswith("_")
        ):
            hint = f" (an object of it is made by {one.__name__}())" if isinstance(one, type) else ""
            raise UserError(f"callbacks should be objects of classes made from yoloxkd's Callback, got {one!r}{hint}")
    return list(given)


def ordered_callbacks(
    recipe: Recipe,
    header: dict[str, Any],
    distillation: Sequence[Callback],
    given: Sequence[Callback],
    console: Console,
) -> list[Callback]:
    """Every callback of a run (the order and its reasons: `engine.events`).

    header  what identifies the student in its checkpoints
    given   objects of the user; one of a class in `CALLBACKS` stands in for the recipe's
    """
    own: dict[str, Callback] = {}
    for name, kind in CALLBACKS.items():
        objects = [c for c in given if type(c) is kind]
        section = recipe.callbacks.get(name, False)
        if objects:
            own[name] = objects[-1]
        elif isinstance(section, Mapping):
            own[name] = kind(**section)
    others = [c for c in given if type(c) not in CALLBACKS.values()]

    def named(*names: str) -> list[Callback]:
        return [own[name] for name in names if name in own]

    return [
        RunFolder(write_yaml(recipe.model_dump(by_alias=True, mode="json"))),
        *distillation,
        FiniteGuard(recipe.engine.max_nonfinite),
        *named("early_stopping"),
        *others,
        *named("learning_rate"),
        CsvLog(),
        ProgressReport(console),
        Checkpoints(header),
        *named("plots", "tensorboard", "wandb", "report"),
        FinalMetrics(),
    ]
