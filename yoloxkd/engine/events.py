"""Events of a training run, and the state that callbacks read and change.

The loop (`engine.loop.TrainLoop.run`), with the event that each callback gets at each place:

    models; of a resumed run, callbacks get their own state back          load_state_dict
    on_setup            models are there, the optimizer is not: the place to register losses in `state.aux`
    optimizer, averaged weights; of a resumed run their state
    on_fit_start        of a resumed run `state` is where it was; the run's folder is there
    for epoch in the epochs left:
        on_epoch_start                  also before the rest of an epoch that is resumed
        for batch in the batches left:
            on_batch_start              `state.batch` is on the device
            for part in the batch:      one, or `train.accumulate` of them
                forward pass
                on_losses               `state.losses` has every term; the terms of the parts add up to the step's
                backward pass
            optimizer, averaged weights
            on_step                     `state.losses` has the terms of the step
        if the epoch is evaluated:
            on_eval_start               last.pt holds the steps of the epoch before anything can fail
            evaluation
            on_eval_end                 `state.metrics` has it; `state.best` is this epoch if it is the best so far
        on_epoch_end                    last.pt is written                state_dict
    on_fit_end
    on_exception        an error or an interruption ends the run; every callback gets it, also when one before it fails here

Each event calls the callbacks in this order (`assembly.run_callbacks` makes it):

run folder, what is said of the first weights, distillation, guard against non-finite losses, early stopping
                then the user's objects, in the order they were given
learning-rate log, gradient log, results.csv, progress
checkpoints     after all that may change their own state or `state.stop`, so that last.pt holds their decisions;
                before an evaluation after the logs, which have written their rows of the epoch by then
plots, TensorBoard, Weights & Biases, report
                after the checkpoint, so that a failure here costs nothing; the later ones read what the earlier ones wrote
metrics.json    last: with it a run counts as finished

In a distributed run rank zero alone calls callbacks, except those with `everywhere`: these run in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from yoloxkd.data.dataset import DetectionData
from yoloxkd.engine.callback_list import CallbackList
from yoloxkd.metrics.measure import larger_is_better
from yoloxkd.nn.detector import Detector
from yoloxkd.types import TASK, Batch, LossName

if TYPE_CHECKING:
    from yoloxkd.viz.html_report import LossHistory, ReportPart


@dataclass(frozen=True, slots=True)
class BestEpoch:
    """The epoch whose student is kept in best.pt.

    Attributes:
        value: What the epochs are compared by, 0 to 1: the number `val.metric`. -1 where it could not be measured, which any later evaluation beats.
        epoch: Number of the epoch, from 0.
        metrics: All numbers of its evaluation, as in metrics.json; empty in a run without an evaluation.
    """

    value: float
    epoch: int
    metrics: dict[str, Any]

    @classmethod
    def after(cls, best: BestEpoch | None, epoch: int, metrics: dict[str, Any], metric: str = "AP") -> BestEpoch:
        """The best epoch when one more is evaluated: the later only where it is better, or where nothing was measured yet."""
        value = larger_is_better(metrics, metric, "val.metric")
        if best is None or best.value < 0 or value > best.value:
            return cls(value if value >= 0 else -1.0, epoch, metrics)  # a NaN is nothing measured, too
        return best


@dataclass
class State:
    """Everything about a run that callbacks may read. They may change `aux` and `stop`, and read the rest.

    Attributes:
        recipe: The resolved recipe (`config.recipe.Recipe`).
        detector: The student, with its raw weights; the averaged ones are in `ema.module`.
        device: Where the student, `batch` and `losses` are.
        out: The run's folder.
        epochs: Of the whole run.
        iters_per_epoch: Steps in an epoch.
        say: Prints one line on the screen and into train.log.
        evaluate: `evaluate(model, n)` gives the metrics of a model on the first n validation images, None: on all.
        val: The validation split.
        callbacks: All of this run, in the order in which they are called.
        aux: `engine.step.AuxiliaryLoss` modules by name; they train with the student and are wrapped by DDP.
        epoch: Number of the present epoch, from 0.
        iteration: Steps done in the whole run.
        step_in_epoch: Steps done in the present epoch.
        sums: Sums of the losses of this epoch over `step_in_epoch` steps, on the device.
        batch: The present batch, (B, 3, H, W) uint8 RGB with its boxes.
        losses: Terms of the present batch, scalars on the device; the training loss is their sum.
        epoch_losses: Means of the terms over the last whole epoch.
        metrics: The last evaluation, as in metrics.json (0 to 1; -1: nothing to measure).
        evaluated: Epoch, from 0, of the last evaluation; None: there was none.
        best: The best epoch so far; None as long as none was evaluated.
        optimizer: There from `on_fit_start` on.
        scaler: The gradient scaler of float16; None else.
        ema: Averaged weights (`engine.ema.ModelEMA`); None where the recipe switches them off.
        lr: Learning rate of the last step.
        images_per_second: Of the last whole epoch.
        stop: Set it to True to end the run after the epoch; it then counts as finished.
        rank: Number of this process.
        world: Number of processes.
        part: Number of the present part of the batch, from 0.
        parts: Into which a batch is divided (`train.accumulate`).
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
    callbacks: CallbackList = field(default_factory=CallbackList)
    aux: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    epoch: int = 0
    iteration: int = 0
    step_in_epoch: int = 0
    sums: dict[LossName, Tensor] = field(default_factory=dict)
    batch: Batch | None = None
    losses: dict[LossName, Tensor] = field(default_factory=dict)
    epoch_losses: dict[LossName, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    evaluated: int | None = None
    best: BestEpoch | None = None
    optimizer: torch.optim.Optimizer | None = None
    scaler: Any = None
    ema: Any = None
    lr: float = 0.0
    images_per_second: float = 0.0
    stop: bool = False
    rank: int = 0
    world: int = 1
    part: int = 0
    parts: int = 1

    def loss_name(self, text: str) -> LossName:
        """The loss that is written so; what is not known (yet) is one of the student's own."""
        names = [*self.epoch_losses, *self.sums]
        for module in self.aux.values():
            names += module.names  # type: ignore[arg-type]
        return next((name for name in names if str(name) == text), LossName(TASK, text))


class Callback:
    """Something that happens at the events of a run: override the methods you need.

    Every event gets the run's `State`; where each comes is said at the top of `yoloxkd.engine.events`. A callback that
    must survive a resume gives what it remembers in `state_dict` and takes it back in `load_state_dict`. What it has to
    tell about the run goes on the screen and into train.log by `state.say`, into environment.json by `environment`, and
    into report.html by `report`.

    Attributes:
        name: Key of its state in last.pt; empty: the name of the class.
        everywhere: In a distributed run, called in every process. Needed by whatever changes the training (losses in
            `state.aux`, gradients); what writes or shows something leaves it off. `state.stop` set by rank zero is enough
            to stop all.

    Example:
        class StopWhenGood(Callback):
            def on_eval_end(self, state: State) -> None:
                state.stop = state.metrics["AP"] > 0.5

        Trainer(student="yolox-nano", data="my.yaml", callbacks=[StopWhenGood()]).fit()
    """

    name: ClassVar[str] = ""
    everywhere: ClassVar[bool] = False

    def on_setup(self, state: State) -> None:
        """Models exist, the optimizer does not."""

    def on_fit_start(self, state: State) -> None:
        """Optimizer, averaged weights and loaders exist."""

    def on_epoch_start(self, state: State) -> None:
        """Before the first batch of an epoch."""

    def on_batch_start(self, state: State) -> None:
        """Before a forward pass."""

    def on_losses(self, state: State) -> None:
        """After a forward pass, before backward."""

    def on_step(self, state: State) -> None:
        """After optimizer and averaged weights. Reading a loss as a number here waits for the device."""

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

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume.

        Returns:
            Tensors, numbers, texts, None and lists, tuples and dicts of them; it is asked for whenever last.pt is written.
            Empty: nothing.
        """
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, before `on_setup`; not called in a new run, or where last.pt has nothing of it.

        Args:
            saved: From a file: tensors are on the CPU, and somebody may have changed it.

        Raises:
            UserError: It is not what `state_dict` gives.
        """

    def environment(self, state: State) -> dict[str, Any]:
        """What environment.json should say of this callback, asked for when the run starts and again when it ends.

        Args:
            state: Of the run; `on_setup` was called.

        Returns:
            {key: JSON value}; keys that no one else has.
        """
        return {}

    def report(self, state: State, history: LossHistory) -> ReportPart | None:
        """What report.html should show of this callback.

        Args:
            state: Of the run.
            history: The losses of every epoch so far.

        Returns:
            Words for the title, notes and sections (`yoloxkd.viz.html_report`); None: nothing.

        Example:
            def report(self, state: State, history: LossHistory) -> ReportPart:
                card = Card("Looks", facts=[("evaluations seen", str(self.looks))])
                return ReportPart(sections=[Section("Stop when good", cards=[card])])
        """
        return None
