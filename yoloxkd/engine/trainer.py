"""Training loop: detectors, losses, batches and callbacks, without knowledge of distillation."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from yoloxkd.config.recipe import Recipe
from yoloxkd.distributed.comm import (
    all_reduce_max,
    barrier,
    peer_lost,
    rank,
    rank_and_world_size,
    single_process,
    world_size,
)
from yoloxkd.engine.device import amp_dtype, grad_scaler, settings, synchronized_norms
from yoloxkd.engine.ema import ModelEMA
from yoloxkd.engine.events import Callback, State
from yoloxkd.engine.failures import explain, memory_advice
from yoloxkd.engine.multiscale import resize_batch, size_at
from yoloxkd.engine.optim import learning_rate, sgd
from yoloxkd.engine.parallel import average_statistics, gradients, wrapped
from yoloxkd.engine.resume import restore
from yoloxkd.engine.step import TrainStep
from yoloxkd.errors import Interrupted
from yoloxkd.types import Batch, Draw, LossName


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


class Fit:
    """One training run over a prepared `State`: `Fit(state, loader, callbacks).run()`.

    resume  a loaded `last.pt`, or None
    """

    def __init__(
        self,
        state: State,
        loader: TrainLoader | None,
        callbacks: Sequence[Callback],
        resume: dict[str, Any] | None = None,
    ) -> None:
        self.state, self.loader, self.callbacks, self.resume = state, loader, list(callbacks), resume
        self.recipe: Recipe = state.recipe
        self.schedule = Schedule.of(self.recipe)
        self.signal: int | None = None

    def run(self) -> State:
        """Train to the last epoch; errors and interruptions pass through `on_exception` and are raised again."""
        state = self.state
        with _signals(self._note_signal), settings(self.recipe.engine, state.device):
            try:
                self._setup()
                self._call("on_fit_start")
                left = range(state.epoch, state.epochs)
                if state.stop or not left:
                    state.epoch -= 1  # all was done already: the last epoch is the one before
                for epoch in left:
                    if state.stop:
                        break
                    self._epoch(epoch)
                self._call("on_fit_end")
            except BaseException as error:
                told = peer_lost(error) or explain(error, state.out)
                self._tell(told or error)
                if isinstance(error, Interrupted):
                    barrier()  # for rank zero's last.pt
                if told is not None:
                    raise told from error
                raise
        return state

    def _tell(self, error: BaseException) -> None:
        """`on_exception` of every callback, also after one of them has failed; the first such failure is raised."""
        failed: Exception | None = None
        for callback in self._mine():
            try:
                with self._as_called(callback):
                    callback.on_exception(self.state, error)
            except Exception as further:
                failed = failed or further
        if failed is not None:
            raise failed from error

    def trial(self) -> Callable[[Batch], None]:
        """Set up, and give a function that makes a step on a batch, in the heavier final phase: for measuring."""
        self._setup()
        self.state.detector.final_phase(True)
        self.state.detector.train()
        return self._batch

    def _setup(self) -> None:
        state, recipe = self.state, self.recipe
        if self.resume is not None:
            state.resumed = self.resume["run"]["extra"]
            state.extra = dict(state.resumed)
        self._call("on_setup")
        amp = amp_dtype(recipe.engine.amp, state.device)
        state.detector.to(state.device)
        state.aux.to(state.device)
        if recipe.engine.channels_last:
            state.detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if recipe.engine.sync_bn:
            synchronized_norms(state.detector, state.device)
        step = TrainStep(state.detector, state.aux, amp)
        self.step: nn.Module = wrapped(step)
        state.optimizer = sgd(
            [state.detector, state.aux],
            lr=self._lr(0),
            momentum=recipe.optim.momentum,
            nesterov=recipe.optim.nesterov,
            weight_decay=recipe.optim.weight_decay,
            decay=recipe.optim.decay,
            bias_lr=recipe.optim.bias_lr,
        )
        state.scaler = grad_scaler(amp, state.device)
        if recipe.ema.enabled:
            state.ema = ModelEMA(state.detector, decay=recipe.ema.decay, ramp=recipe.ema.ramp)
        if self.resume is not None:
            restore(state, self.resume)
            self.resume = None
        if recipe.engine.compile:
            state.detector.compile()

    def _epoch(self, epoch: int) -> None:
        state, strong = self.state, self.schedule.strong(epoch)
        state.epoch = epoch
        if state.step_in_epoch == 0:
            state.sums = {}
        assert self.loader is not None
        self.loader.set_epoch(epoch, strong, state.step_in_epoch)
        state.detector.final_phase(not strong)
        state.detector.train()
        state.aux.train()
        self._call("on_epoch_start")
        started, first = time.perf_counter(), state.step_in_epoch
        for batch in self.loader:
            self._batch(batch)
            self._check_interrupted()
        steps = state.step_in_epoch
        seconds = max(time.perf_counter() - started, 1e-9)
        if steps > first:  # else they were made before this resume
            state.images_per_second = (steps - first) * self.recipe.train.batch / seconds
        state.epoch_losses = {name: float(total) / max(steps, 1) for name, total in state.sums.items()}
        if self.schedule.evaluates(epoch):
            self._call("on_eval_start")
            state.metrics = state.evaluate(state.ema.module if state.ema else state.detector, None)
            self._call("on_eval_end")
        state.step_in_epoch = 0
        self._call("on_epoch_end")
        state.stop = bool(all_reduce_max(int(state.stop)))
        self._check_interrupted()

    def _batch(self, batch: Batch) -> None:
        state, recipe = self.state, self.recipe
        batch = batch.to(state.device)
        if isinstance(recipe.train.imgsz, int):
            size = size_at(
                state.iteration,
                imgsz=recipe.train.imgsz,
                steps=recipe.augment.multiscale,
                stride=state.detector.size_multiple,
                seed=recipe.train.seed,
            )
            batch = resize_batch(batch, size)
        state.batch = replace(batch, place=rank_and_world_size())
        state.lr = self._lr(state.iteration)
        assert state.optimizer is not None
        for group in state.optimizer.param_groups:
            group["lr"] = state.lr * group.get("lr_factor", 1.0)
        self._call("on_batch_start")
        with memory_advice(
            f"a training step of {recipe.train.batch} images of {batch.images.shape[2]}x{batch.images.shape[3]} px",
            "lower --batch or --imgsz, use --amp bf16, or take a batch in parts with train.accumulate",
        ):
            state.optimizer.zero_grad(set_to_none=True)
            draw = Draw(recipe.train.seed, state.iteration)
            parts = [state.batch.part(number, state.parts) for number in range(state.parts)]
            state.losses = gradients(self.step, parts, draw, self._backward, self._told)
            self._optimize(state.optimizer)
        for name, value in state.losses.items():
            state.sums[name] = state.sums.get(name, 0.0) + value
        state.step_in_epoch += 1
        state.iteration += 1
        average_statistics(self.step)
        if state.ema:
            state.ema.update(state.detector)
        self._call("on_step")

    def _told(self, part: int, losses: dict[LossName, Tensor]) -> dict[LossName, Tensor]:
        self.state.part, self.state.losses = part, losses
        self._call("on_losses")
        return self.state.losses

    def _backward(self, total: Tensor) -> None:
        scaler = self.state.scaler
        (scaler.scale(total) if scaler else total).backward()

    def _optimize(self, optimizer: torch.optim.Optimizer) -> None:
        scaler, clip = self.state.scaler, self.recipe.optim.clip_norm
        if clip is not None:
            if scaler:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()

    def _lr(self, iteration: int) -> float:
        return learning_rate(self.recipe, iteration, self.state.iters_per_epoch)

    def _check_interrupted(self) -> None:
        number = all_reduce_max(self.signal or 0)  # one process may have been told alone
        if number:
            name = signal.Signals(number).name
            raise Interrupted(
                f"stopped by {name} in epoch {self.state.epoch + 1}; continue with: --resume {self.state.out}"
            )

    def _note_signal(self, number: int) -> None:
        if self.signal is not None and world_size() == 1:  # torchrun passes on what the terminal has sent already
            raise KeyboardInterrupt  # asked twice: do not wait for the step to end
        self.signal = number

    def _call(self, event: str) -> None:
        for callback in self._mine():
            with self._as_called(callback):
                getattr(callback, event)(self.state)

    def _mine(self) -> list[Callback]:
        """The callbacks of this process."""
        return [callback for callback in self.callbacks if callback.everywhere or rank() == 0]

    @staticmethod
    def _as_called(callback: Callback) -> AbstractContextManager[None]:
        return nullcontext() if callback.everywhere else single_process()


@contextmanager
def _signals(note: Callable[[int], None], watched: Iterable[int] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the current step; handlers are put back afterwards."""
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
