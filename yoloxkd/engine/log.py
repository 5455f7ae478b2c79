"""Log lines for the screen and for the run's `train.log`."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console


class RunLog:
    """Call it with a line. Lines said before the run has begun, and `recipe.yaml` is in its folder, are kept and written then."""

    def __init__(self, console: Console, out: Path) -> None:
        self.console, self.file = console, out / "train.log"
        self.waiting: list[str] = []

    def __call__(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.waiting += [f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {part}\n" for part in line.splitlines()]
        if self.file.with_name("recipe.yaml").is_file():
            try:
                with open(self.file, "a", encoding="utf-8", errors="backslashreplace") as file:
                    file.writelines(self.waiting)
            except OSError:  # full or read-only: kept for the next line; what must be written says so itself
                return
            self.waiting = []
