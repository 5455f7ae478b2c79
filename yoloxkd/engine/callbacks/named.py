"""Base class of callbacks that a recipe can name."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from yoloxkd.config.load import validate
from yoloxkd.config.strict import Strict
from yoloxkd.engine.events import Callback
from yoloxkd.errors import UserError


class NamedCallback(Callback):
    """A callback with a typed section of its own, `callbacks.<name>`, in the recipe.

    name     its key there and in `CALLBACKS`
    Config   the keys of its section; in Python they are keyword arguments: `EarlyStopping(patience=5)`, or one Config
    default  whether a run has it without being asked
    """

    name: ClassVar[str]
    Config: ClassVar[type[Strict]]
    default: ClassVar[bool] = False

    def __init__(self, config: Strict | None = None, **keys: Any) -> None:
        where = f"callback {self.name}"
        self.cfg: Any = config or validate(self.Config, keys, where, prefix=f"callbacks.{self.name}.")

    def check_folder_name(self, out: Path) -> None:
        """UserError: the run's folder has a name that another package would fail on in the middle of the run."""
        try:
            str(out.resolve()).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"callbacks.{self.name} writes to folders with names in UTF-8 only, and {out} is none; give another --out"
            ) from None

    def needs(self, module: str, extra: str) -> ModuleType:
        """Import an optional package, or say how to install it."""
        try:
            return importlib.import_module(module)
        except ImportError as error:
            package = module.partition(".")[0] if extra == "wandb" else extra
            raise UserError(
                f"callbacks.{self.name} needs the package {package}, which is not installed ({error}): "
                f"pip install 'yoloxkd[{extra}]'"
            ) from error
