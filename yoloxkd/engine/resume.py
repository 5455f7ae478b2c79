"""State of a run beyond the weights (`last.pt`), and exact resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from yoloxkd.config.renamed import RENAMED_TERMS, current_column
from yoloxkd.engine.checkpoint import random_state, restore_random_state
from yoloxkd.engine.events import BestEpoch, State
from yoloxkd.errors import UserError
from yoloxkd.nn.weights.load import check_state
from yoloxkd.types import LossName

SGD_STATE = {"momentum_buffer": "momentum"}
ADAM_STATE = {"exp_avg": "mean gradient", "exp_avg_sq": "mean squared gradient", "step": "number of steps"}


def run_state(state: State, *, epoch: int, step_in_epoch: int) -> dict[str, Any]:
    """Everything the continuation depends on. Sample order, augmentation, learning rate and multi-scale size are pure
    functions of (seed, epoch, index, iteration), so their position is all that needs keeping.
    """
    return {
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "iteration": state.iteration,
        "lr": state.lr,
        "sums": [[*name, float(v)] for name, v in state.sums.items()] if step_in_epoch else [],
        "best": asdict(state.best) if state.best else None,
        "metrics": state.metrics,
        "evaluated": state.evaluated,
        "stop": state.stop,
        "aux": state.aux.state_dict(),
        "optimizer": state.optimizer.state_dict() if state.optimizer else None,
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "ema": state.ema.state_dict() if state.ema else None,
        "callbacks": state.callbacks.state_dict(),
        "rng": random_state(),
    }


def restore(state: State, saved: Mapping[str, Any]) -> None:
    """Put a `run_state` (under its checkpoint's "run" key, with the raw weights under "model") back.

    saved  checked by `checkpoint_parts.read_saved`: its parts have the right types. UserError: they are not of this run
    """
    run = saved["run"]
    if run["step_in_epoch"] > state.iters_per_epoch:
        raise UserError(
            f"{_of('position')}: {run['step_in_epoch']} steps of an epoch are done, which has {state.iters_per_epoch}"
        )
    with _naming("weights"):
        check_state(state.detector.state_dict(), saved["model"])
    state.detector.load_state_dict(saved["model"])
    with _naming("weights beside the student's"):
        check_state(state.aux.state_dict(), run["aux"])
    state.aux.load_state_dict(run["aux"])
    if state.optimizer:
        state.optimizer.load_state_dict(_optimizer(state.optimizer, run["optimizer"]))
        for group in state.optimizer.param_groups:  # of the last step, where none is left to be made
            group["lr"] = run["lr"] * group.get("lr_factor", 1.0)
    if state.scaler and run["scaler"]:
        with _naming("loss scale"):
            check_keys(state.scaler.state_dict(), run["scaler"])
        state.scaler.load_state_dict(run["scaler"])
    if state.ema:
        if run["ema"] is None:
            raise UserError(f"{_of('averaged weights')}: there are none")
        with _naming("averaged weights"):
            check_state(state.ema.module.state_dict(), run["ema"]["module"])
        state.ema.load_state_dict(run["ema"])
    state.epoch, state.step_in_epoch, state.iteration = run["epoch"], run["step_in_epoch"], run["iteration"]
    state.best = BestEpoch(**run["best"]) if run["best"] else None
    state.metrics, state.evaluated, state.lr = run["metrics"], run["evaluated"], run["lr"]
    state.stop = run.get("stop", False)
    state.images_per_second = saved.get("images_per_second", 0.0)
    sums = run["sums"]
    if isinstance(sums, dict):  # version 0.1.0
        sums = [[*state.loss_name(current_column(text)), value] for text, value in sums.items()]
    like = next(state.detector.parameters())
    state.sums = {
        LossName(source, RENAMED_TERMS.get(term, term), level): like.new_tensor(value)
        for source, term, level, value in sums
    }
    try:
        restore_random_state(run["rng"])
    except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:  # what the generators raise
        raise UserError(f"{_of('random state')}: {' '.join(str(error).split())}") from error


def _optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """The saved momenta, checked, in the groups of the recipe; of AdamW with the saved relative rates."""
    if saved is None:
        raise UserError(f"{_of('optimizer state')}: there is none")
    groups = optimizer.state_dict()["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    parameters = dict(zip(numbers, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    kept = ADAM_STATE if isinstance(optimizer, torch.optim.AdamW) else SGD_STATE
    state = {
        number: {name: entry[name] for name in kept if entry.get(name) is not None}
        for number, entry in saved["state"].items()
    }
    state = {number: entry for number, entry in state.items() if entry}
    with _naming("optimizer state"):
        if any(number not in parameters for number in state):
            raise UserError(f"it is of {max(state) + 1} parameters, and {len(parameters)} are trained")
        check_state(
            {
                f"{kept[name]} of parameter {number}": torch.zeros(())
                if name == "step"
                else parameters[number].detach()
                for number in state
                for name in kept
            },
            {
                f"{kept[name]} of parameter {number}": value
                for number, entry in state.items()
                for name, value in entry.items()
            },
        )
        if kept is ADAM_STATE:  # its rates follow from the weights that the run began with
            factors = [group.get("lr_factor") for group in saved.get("param_groups", [])]
            if len(factors) != len(groups) or not all(isinstance(factor, float) for factor in factors):
                raise UserError(f"it has not the rates of {len(groups)} tensors")
            groups = [group | {"lr_factor": factor} for group, factor in zip(groups, factors, strict=True)]
    return {"state": state, "param_groups": groups}


def check_keys(expected: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """UserError: a saved mapping lacks keys."""
    if missing := [key for key in expected if key not in saved]:
        raise UserError(f"it lacks {', '.join(missing)}")


def _of(part: str) -> str:
    return f"the checkpoint cannot be resumed, it was changed or is of another run; its {part}"


@contextmanager
def _naming(part: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{_of(part)}: {error}") from error
