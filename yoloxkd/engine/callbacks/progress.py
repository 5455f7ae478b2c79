"""Progress on the screen: a live bar on a terminal, plain lines elsewhere, one summary line an epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from yoloxkd.engine.events import Callback, State
from yoloxkd.types import LossName

REFRESH = 10  # steps between looks at the losses: each look waits for the device
PLAIN_SECONDS = 20  # seconds between lines where there is no terminal


def by_term(losses: Mapping[LossName, float]) -> dict[LossName, float]:
    """Losses summed over levels."""
    out: dict[LossName, float] = {}
    for name, value in losses.items():
        term = name._replace(level=None)
        out[term] = out.get(term, 0.0) + value
    return out


def peak_memory(device: torch.device) -> float | None:
    """GB at most taken so far: on CUDA by tensors, on the CPU by this process; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def duration(seconds: float) -> str:
    """ "1:02:03", "2:03" """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _line(losses: Mapping[LossName, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in by_term(losses).items())


class ProgressReport(Callback):
    """Epoch, batch, every loss term (summed over levels), images/s, time left for the epoch and the run, peak memory."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None

    def on_fit_start(self, state: State) -> None:
        self.fit_started, self.fit_first = time.perf_counter(), state.iteration

    def on_epoch_start(self, state: State) -> None:
        self.started = self.shown = time.perf_counter()
        self.first = state.step_in_epoch
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[status]}"), console=self.console)
            self.losses = Text(style="dim")
            label = f"epoch {state.epoch + 1}/{state.epochs}"
            self.task = self.bar.add_task(label, total=state.iters_per_epoch, completed=self.first, status="")
            self.live = Live(Group(self.bar, self.losses), console=self.console, transient=True)
            self.live.start()

    def on_step(self, state: State) -> None:
        now = time.perf_counter()
        if self.live is not None:
            if (state.step_in_epoch - self.first) % REFRESH == 1:
                self.losses.plain = _line(_values(state))
            self.bar.update(self.task, completed=state.step_in_epoch, status=self._status(state, now))
        elif now - self.shown > PLAIN_SECONDS:
            self.shown = now
            at = f"epoch {state.epoch + 1}/{state.epochs}  batch {state.step_in_epoch}/{state.iters_per_epoch}"
            line = f"{at}  {self._status(state, now)}  {_line(_values(state))}"
            self.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def on_epoch_end(self, state: State) -> None:
        self._close()
        parts = [f"epoch {state.epoch + 1}/{state.epochs}", f"{state.images_per_second:.1f} images/s"]
        parts += [f"lr {state.lr:.2e}", _line(state.epoch_losses)]
        if state.evaluated == state.epoch:
            shown = [name for name in ("AP", "AP50", "mask_AP", "MR", "JI") if name in state.metrics]
            parts.append(" ".join(f"{name} {state.metrics[name]:.4f}" for name in shown))
        if state.epoch + 1 < state.epochs and not state.stop:
            parts.append(f"{self._run_remaining(state, time.perf_counter())} left")
        state.say("  ".join(parts))

    def on_fit_end(self, state: State) -> None:
        self._close()

    def on_exception(self, state: State, error: BaseException) -> None:
        self._close()

    def _status(self, state: State, now: float) -> str:
        done = state.step_in_epoch - self.first
        seconds = (now - self.started) / max(done, 1)
        remaining = duration(seconds * (state.iters_per_epoch - state.step_in_epoch))
        parts = [f"{state.recipe.train.batch / max(seconds, 1e-9):.1f} images/s"]
        parts += [f"epoch {remaining} left", f"run {self._run_remaining(state, now)} left"]
        if (memory := peak_memory(state.device)) is not None:
            parts.append(f"memory {memory:.2f} GB")
        return "  ".join(parts)

    def _run_remaining(self, state: State, now: float) -> str:
        """From the time all steps of this session took, evaluations included."""
        done = max(state.iteration - self.fit_first, 1)
        return duration((now - self.fit_started) / done * (state.epochs * state.iters_per_epoch - state.iteration))

    def _close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def _values(state: State) -> dict[LossName, float]:
    return {name: float(value.detach()) for name, value in state.losses.items()}
