"""What `last.pt` holds beyond the weights, and how a run continues from it exactly where it stopped."""

from __future__ import annotations

from typing import Any

from yoloxkd.engine.checkpoint import random_state, restore_random_state
from yoloxkd.engine.events import State
from yoloxkd.types import LossName


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
        "best": state.best,
        "metrics": state.metrics,
        "stop": state.stop,
        "aux": state.aux.state_dict(),
        "optimizer": state.optimizer.state_dict() if state.optimizer else None,
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "ema": state.ema.state_dict() if state.ema else None,
        "extra": state.extra,
        "rng": random_state(),
    }


def restore(state: State, saved: dict[str, Any]) -> None:
    """Put a `run_state` (under its checkpoint's "run" key, with the raw weights under "model") back."""
    run = saved["run"]
    state.detector.load_state_dict(saved["model"])
    state.aux.load_state_dict(run["aux"])
    if state.optimizer:
        state.optimizer.load_state_dict(run["optimizer"])
    if state.scaler and run["scaler"]:
        state.scaler.load_state_dict(run["scaler"])
    if state.ema and run["ema"]:
        state.ema.load_state_dict(run["ema"])
    state.epoch, state.step_in_epoch, state.iteration = run["epoch"], run["step_in_epoch"], run["iteration"]
    state.best, state.metrics, state.lr = run["best"], run["metrics"], run["lr"]
    state.stop = run.get("stop", False)
    sums = run["sums"]
    if isinstance(sums, dict):  # version 0.1.0
        sums = [[*state.loss_name(text), value] for text, value in sums.items()]
    like = next(state.detector.parameters())
    state.sums = {LossName(*name): like.new_tensor(value) for *name, value in sums}
    restore_random_state(run["rng"])
