"""Progress through a video, on stderr: a line that is written over on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

TERMINAL_SECONDS = 0.5
PLAIN_SECONDS = 20.0


class FrameProgress:
    """Frames done, frames a second, and the time left where the length is known.

    Args:
        label: Names the video.
        total: Frames there will be; 0: not known, as of a camera.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.terminal = sys.stderr.isatty()
        self.started = self.shown = time.monotonic()

    def __call__(self, done: int) -> None:
        """Say that so many frames are done, unless it was said a moment ago."""
        now = time.monotonic()
        if now - self.shown < (TERMINAL_SECONDS if self.terminal else PLAIN_SECONDS):
            return
        self.shown = now
        speed = done / max(now - self.started, 1e-9)
        line = f"{self.label}: frame {done}" + (f" of {self.total}" if self.total else "") + f", {speed:.1f} frames/s"
        if self.total:
            minutes, seconds = divmod(round(max(self.total - done, 0) / speed), 60)
            line += f", {minutes}:{seconds:02d} left"
        print(
            f"\r{line}\x1b[K" if self.terminal else line, end="" if self.terminal else "\n", file=sys.stderr, flush=True
        )

    def clear(self) -> None:
        """Take the line off the terminal."""
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
