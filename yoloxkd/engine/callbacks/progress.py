"""What the screen shows: a live bar on a terminal, plain lines elsewhere, one summary line an epoch on both."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from yoloxkd.engine.events import Callback, State

REFRESH = 10  # steps between looks at the losses: each look waits for the device
PLAIN_SECONDS = 20  # seconds between lines where there is no terminal


def by_term(losses: Mapping[str, float]) -> dict[str, float]:
    """Losses summed over levels: "pgd/cls_fg/s8" and "pgd/cls_fg/s16" become "pgd/cls_fg"."""
    out: dict[str, float] = {}
    for name, value in losses.items():
        term = name.rsplit("/s", 1)[0] if "/s" in name else name
        out[term] = out.get(term, 0.0) + value
    return out


def _line(losses: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in by_term(losses).items())


class ProgressReport(Callback):
    """Epoch, batch, every loss term, images/s and remaining time."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None

    def on_epoch_start(self, state: State) -> None:
        self.started = self.shown = time.perf_counter()
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[losses]}"), console=self.console, transient=True)
            self.bar.start()
            label = f"epoch {state.epoch + 1}/{state.epochs}"
            self.task = self.bar.add_task(label, total=state.iters_per_epoch, completed=state.step_in_epoch, losses="")

    def on_step(self, state: State) -> None:
        now = time.perf_counter()
        if self.bar is not None:
            losses = {}
            if state.step_in_epoch % REFRESH == 1:
                losses = {"losses": _line({k: float(v.detach()) for k, v in state.losses.items()})}
            self.bar.update(self.task, completed=state.step_in_epoch, **losses)  # type: ignore[arg-type]
        elif now - self.shown > PLAIN_SECONDS:
            self.shown = now
            at = f"epoch {state.epoch + 1}/{state.epochs} batch {state.step_in_epoch}/{state.iters_per_epoch}"
            self.console.print(
                f"{at}  {_line({k: float(v.detach()) for k, v in state.losses.items()})}", highlight=False
            )

    def on_epoch_end(self, state: State) -> None:
        self._close()
        parts = [f"epoch {state.epoch + 1}/{state.epochs}", f"{state.images_per_second:.1f} images/s"]
        parts += [f"lr {state.lr:.2e}", _line(state.epoch_losses)]
        if state.extra.get("evaluated") == state.epoch:
            shown = [name for name in ("AP", "AP50", "MR", "JI") if name in state.metrics]
            parts.append(" ".join(f"{name} {state.metrics[name]:.4f}" for name in shown))
        state.say("  ".join(parts))

    def on_exception(self, state: State, error: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
