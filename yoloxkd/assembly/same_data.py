"""Check that a resumed run uses the data it began with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yoloxkd.data.data_spec import DataSpec, find_data
from yoloxkd.data.fingerprint import changed
from yoloxkd.engine.checkpoint_parts import Saved
from yoloxkd.errors import UserError


def data_of_run(name: str, saved: Saved | None, out: Path) -> DataSpec:
    """The data set of a recipe. `saved`: the last.pt of the run that goes on.

    UserError: it is not there, or its classes are not those of the run: a class layer would take another meaning.
    """
    if saved is None:
        return find_data(name)
    try:
        spec = find_data(name)
    except UserError as error:
        raise UserError(f"{error} (has it moved? Say where it is now: --resume {out} --data FILE)") from error
    before = saved.names
    if before != spec.names:
        raise UserError(
            f"the classes of {name} are not those of the run in {out}: {_difference(before, spec.names)}; put them back, or "
            f"start a new run, which may begin with these weights: --student {out / 'last.pt'} --data {name}"
        )
    return spec


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    if len(before) != len(now):
        changed_names = [n for n in now if n not in before] or [n for n in before if n not in now]
        return (
            f"{len(before)} classes then and {len(now)} now (such as '{changed_names[0]}')"
            if changed_names
            else "another number"
        )
    position = next(i for i, (a, b) in enumerate(zip(before, now, strict=True)) if a != b)
    how = ", which is another order" if sorted(before) == sorted(now) else ""
    return f"class {position} was '{before[position]}' and is '{now[position]}'{how}"


def say_changes(saved: Saved, now: Mapping[str, dict[str, Any]], say: Callable[[str], None]) -> None:
    """A warning for each split that is not what the run was trained and measured on before.

    now  split -> its fingerprint
    """
    if not saved.data:
        say(
            f"note: the checkpoint is of version {saved.version}, which kept no digest of the data; only the class names were "
            "compared"
        )
        return
    for split, fingerprint in now.items():
        before = saved.data.get(split)
        if before is not None and (difference := changed(before.model_dump(), fingerprint)):
            say(
                f"warning: the data changed since this run's last checkpoint: '{split}' had {difference}; the run goes on "
                "with the data as they are now, so it is no longer the run that was begun"
                + (", and AP before and after are not of the same images" if split != "train" else "")
            )
