"""Events of a training run, in order, and the state that callbacks read and change.

on_setup        once; models exist, optimizer does not: the place to register auxiliary losses in `state.aux`
on_fit_start    once; optimizer, EMA and loaders exist (after a resume they hold the resumed state); the run's folder is there
on_epoch_start  every epoch, before its first batch, and before the first of the rest of an epoch that is resumed
on_batch_start  every batch, before the forward pass; `state.batch` is on the device
on_losses       every batch, after the forward pass; `state.losses` holds every term (device tensors). With
                `train.accumulate`, after the forward pass of each part; the terms of the parts add up to the step's
on_step         every batch, after the optimizer and EMA have stepped
on_eval_start   before each evaluation, when the steps of its epoch are done: last.pt holds them before anything can fail
on_eval_end     after each evaluation; `state.metrics` holds it
on_epoch_end    every epoch, after its evaluation if it had one
on_fit_end      once, after the last epoch
on_exception    when the run ends by an error or an interruption, before it is raised again; every callback is called, also
                when one before it fails here

Each event calls the callbacks in this order (`build.callbacks` makes it):

run folder, distiller, guard against non-finite losses, early stopping
                then the user's objects, in the order they were given
learning-rate log, results.csv, progress
checkpoints     after all that may change `state.extra`, `state.best` or `state.stop`, so that last.pt holds their decisions;
                before an evaluation after the logs, which have written their rows of the epoch by then
plots, TensorBoard, Weights & Biases, report
                after the checkpoint, so that a failure here costs nothing; the later ones read what the earlier ones wrote
metrics.json    last: with it a run counts as finished

In a distributed run rank zero alone calls callbacks, except those with `everywhere`: these run in every process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from yoloxkd.data.dataset import DetectionData
from yoloxkd.nn.detector import Detector
from yoloxkd.types import TASK, Batch, LossName


@dataclass
class State:
    """Everything about a run that callbacks may read; they may change `aux`, `extra` and `stop` and read the rest.

    aux     `engine.step.AuxiliaryLoss` modules; they train with the student and are wrapped by DDP
    losses  {name: scalar tensor} of the current batch, task losses and auxiliary ones; the training loss is their sum
    sums    {name: device tensor}, running sums of the losses of this epoch over `step_in_epoch` steps
    extra   {key: plain containers or tensors} that callbacks want kept in `last.pt`
    resumed what `extra` held in the checkpoint this run continues; empty for a fresh run
    say     prints one line on the screen and in train.log
    rank, world  number of this process and of all; part, parts: of the batch, with `train.accumulate`
    val     the validation split
    stop    set it to True to end the run after the epoch; it then counts as finished
    evaluate  evaluates a model on (at most n images of) the validation set: evaluate(model, n) -> metrics
    """

    recipe: Any
    detector: Detector[Any, Any]
    device: torch.device
    out: Path
    epochs: int
    iters_per_epoch: int
    say: Callable[[str], None]
    evaluate: Callable[[Detector[Any, Any], int | None], dict[str, Any]]
    val: DetectionData
    aux: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    epoch: int = 0
    iteration: int = 0
    step_in_epoch: int = 0
    sums: dict[LossName, Tensor] = field(default_factory=dict)
    batch: Batch | None = None
    losses: dict[LossName, Tensor] = field(default_factory=dict)
    epoch_losses: dict[LossName, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    best: float = -1.0
    optimizer: torch.optim.Optimizer | None = None
    scaler: Any = None
    ema: Any = None
    lr: float = 0.0
    images_per_second: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    resumed: dict[str, Any] = field(default_factory=dict)
    stop: bool = False
    rank: int = 0
    world: int = 1
    part: int = 0
    parts: int = 1

    def loss_name(self, text: str) -> LossName:
        """The loss that is written so; what is not known (yet) is one of the student's own."""
        known = [*self.epoch_losses, *self.sums]
        for module in self.aux.values():
            known += module.names  # type: ignore[arg-type]
        return next((name for name in known if str(name) == text), LossName(TASK, text))


class Callback:
    """Override what you need; every method gets the run's State.

    everywhere  in a distributed run: called in every process. Needed by whatever changes the training (losses in
                `state.aux`, gradients); what writes or shows something leaves it off. `state.stop` set by rank zero is
                enough to stop all
    """

    everywhere: ClassVar[bool] = False

    def on_setup(self, state: State) -> None:
        """Models exist, the optimizer does not."""

    def on_fit_start(self, state: State) -> None:
        """Optimizer, EMA and loaders exist."""

    def on_epoch_start(self, state: State) -> None:
        """Before the first batch of an epoch."""

    def on_batch_start(self, state: State) -> None:
        """Before a forward pass."""

    def on_losses(self, state: State) -> None:
        """After a forward pass, before backward."""

    def on_step(self, state: State) -> None:
        """After optimizer and EMA."""

    def on_eval_start(self, state: State) -> None:
        """After the last step of an epoch that is evaluated."""

    def on_eval_end(self, state: State) -> None:
        """After an evaluation."""

    def on_epoch_end(self, state: State) -> None:
        """After an epoch and its evaluation."""

    def on_fit_end(self, state: State) -> None:
        """After the last epoch."""

    def on_exception(self, state: State, error: BaseException) -> None:
        """The run is about to end with `error`."""
