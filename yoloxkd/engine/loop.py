"""Training loop: epochs, events, evaluation, interruption and resuming, without knowledge of distillation."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from yoloxkd.config.recipe import Recipe
from yoloxkd.distributed.comm import all_reduce_max, barrier, broadcast, peer_lost, world_size
from yoloxkd.engine.device import settings
from yoloxkd.engine.events import BestEpoch, Callback, State
from yoloxkd.engine.failures import explain
from yoloxkd.engine.stepper import Stepper
from yoloxkd.errors import Interrupted
from yoloxkd.types import Batch

HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
"""What a process gets whose terminal is lost; there is none on Windows."""


class TrainLoader(Protocol):
    """Batches of an epoch; `set_epoch` chooses which."""

    def set_epoch(self, epoch: int, strong: bool, start_batch: int = 0) -> None: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...


@dataclass
class Schedule:
    """Epoch numbers of a run, derived from the recipe."""

    epochs: int
    final: int
    eval_every: int

    @classmethod
    def of(cls, recipe: Recipe) -> Schedule:
        n = recipe.train.epochs
        return cls(n, recipe.schedule.final(n), recipe.val.every(n))

    def strong(self, epoch: int) -> bool:
        """Whether mosaic and mixup are on (all but the final epochs)."""
        return epoch < self.epochs - self.final

    def evaluates(self, epoch: int) -> bool:
        return (epoch + 1) % self.eval_every == 0 or epoch + 1 == self.epochs or not self.strong(epoch)


class TrainLoop:
    """One training run over a prepared `State`: `TrainLoop(state, loader).run()`.

    Args:
        state: Of the run, with its callbacks.
        loader: Gives the batches of each epoch.
        resume: A loaded last.pt that the run goes on from; None: it begins.
    """

    def __init__(self, state: State, loader: TrainLoader, resume: dict[str, Any] | None = None) -> None:
        self.state, self.loader, self.resume = state, loader, resume
        self.stepper = Stepper(state)
        self.schedule = Schedule.of(state.recipe)
        self.signal: int | None = None

    def run(self) -> State:
        """Train to the last epoch.

        Returns:
            The run's state at its end.

        Raises:
            Interrupted: SIGINT, SIGTERM or SIGHUP came; last.pt holds the last step.
            UserError: What the machine or the user must mend. As every error it passes through `on_exception`.
        """
        state = self.state
        with _signals(self._note_signal), self._settings():
            try:
                self.set_up()
                self._call(lambda callback: callback.on_fit_start(state))
                state.best = broadcast(state.best)  # rank zero alone knows whether best.pt is still there
                epochs = range(state.epoch, state.epochs)
                if state.stop or not epochs:
                    state.epoch -= 1  # all was done already: the last epoch is the one before
                for epoch in epochs:
                    if state.stop:
                        break
                    self._epoch(epoch)
                if state.best is None:  # nothing was evaluated, or best.pt is lost: the last student is the best
                    state.best = BestEpoch(-1.0, state.epoch, state.metrics if state.evaluated == state.epoch else {})
                self._call(lambda callback: callback.on_fit_end(state))
            except BaseException as error:
                sentence = peer_lost(error) or explain(error, state.out)
                state.callbacks.on_exception(state, sentence or error)
                if isinstance(error, Interrupted):
                    barrier()  # for rank zero's last.pt
                if sentence is not None:
                    raise sentence from error
                raise
        return state

    def _settings(self) -> AbstractContextManager[None]:
        recipe = self.state.recipe
        return settings(recipe.engine, self.state.device, few_sizes=isinstance(recipe.train.imgsz, int))

    def set_up(self) -> None:
        """Everything before the first event of the training; a resumed run is then where it was."""
        resume, self.resume = self.resume, None  # its tensors are not needed any more
        self.stepper.set_up(resume)

    def _epoch(self, epoch: int) -> None:
        state, strong = self.state, self.schedule.strong(epoch)
        state.epoch = epoch
        if state.step_in_epoch == 0:
            state.sums = {}
        self.loader.set_epoch(epoch, strong, state.step_in_epoch)
        state.detector.final_phase(not strong)
        state.detector.train()
        state.aux.train()
        self._call(lambda callback: callback.on_epoch_start(state))
        started, first = time.perf_counter(), state.step_in_epoch
        for batch in self.loader:
            self.stepper.step(batch)
            self._check_interrupted()
        steps = state.step_in_epoch
        seconds = max(time.perf_counter() - started, 1e-9)
        if steps > first:  # else they were made before this resume
            state.images_per_second = (steps - first) * state.recipe.train.batch / seconds
        state.epoch_losses = {name: float(total) / max(steps, 1) for name, total in state.sums.items()}
        if self.schedule.evaluates(epoch):
            self._evaluate()
        state.step_in_epoch = 0
        self._call(lambda callback: callback.on_epoch_end(state))
        state.stop = bool(all_reduce_max(int(state.stop)))
        self._check_interrupted()

    def _evaluate(self) -> None:
        state = self.state
        self._call(lambda callback: callback.on_eval_start(state))
        state.metrics = state.evaluate(state.ema.module if state.ema else state.detector, None)
        state.evaluated = state.epoch
        state.best = BestEpoch.after(state.best, state.epoch, state.metrics, state.recipe.val.metric)
        self._call(lambda callback: callback.on_eval_end(state))

    def _call(self, event: Callable[[Callback], None]) -> None:
        self.state.callbacks.call(event)

    def _check_interrupted(self) -> None:
        number = all_reduce_max(self.signal or 0)  # the signal may have reached one process alone
        if number:
            name = signal.Signals(number).name
            raise Interrupted(
                f"stopped by {name} in epoch {self.state.epoch + 1}; continue with: --resume {self.state.out}"
            )

    def _note_signal(self, number: int) -> None:
        if self.signal == number == HANGUP:
            return  # the terminal and the shell each say that it is gone
        if self.signal is not None and world_size() == 1:  # torchrun passes on what the terminal has sent already
            raise KeyboardInterrupt  # asked twice: do not wait for the step to end
        self.signal = number


@contextmanager
def _signals(note: Callable[[int], None]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a lost terminal end the run after the current step; handlers are put back afterwards.

    Where a lost terminal is ignored already (nohup), it stays so.
    """
    watched = [signal.SIGINT, signal.SIGTERM]
    if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
        watched.append(HANGUP)
    try:
        previous = {s: signal.signal(s, lambda number, frame: note(number)) for s in watched}
    except ValueError:  # not in the main thread: Python delivers no signals here
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
