"""Run commands one after another or in parallel, with their CPU time and clean interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from yoloxkd.errors import Interrupted, UserError

LOCK = ".study.lock"


@dataclass(frozen=True)
class Cost:
    """Of a finished command: exit status (negative: ended by that signal), wall seconds, processor seconds.

    Processor seconds include those of its own children that it has waited for, such as loader processes.
    """

    status: int
    wall: float
    cpu: float


class Processes:
    """The commands under way. After `stop` no new one starts, and those under way have been sent the signal."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.stopped_by: int | None = None
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, command: Sequence[str], log: Path, descriptors: Sequence[int] = ()) -> Cost:
        """Run a command to its end, its output appended to `log`. Interrupted: `stop` was called before it began."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            started = time.perf_counter()
            with self._lock:
                if self.stopped_by is not None:
                    raise Interrupted(f"stopped by {signal.Signals(self.stopped_by).name}")
                # a process group of its own: Ctrl-C reaches it once, from here, and not a second time from the terminal
                process = subprocess.Popen(
                    list(command),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    process_group=0,
                    pass_fds=tuple(descriptors),
                )
                self._running.add(process)
            _, status, usage = os.wait4(process.pid, 0)
            with self._lock:
                self._running.discard(process)
                process.returncode = os.waitstatus_to_exitcode(status)
        return Cost(process.returncode, time.perf_counter() - started, usage.ru_utime + usage.ru_stime)

    def stop(self, number: int) -> None:
        """Ask every command under way to end, as the signal `number` would.

        SIGHUP reaches them as SIGTERM, after which a training writes last.pt.
        """
        with self._lock:
            self.stopped_by = number
            for process in self._running:
                process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Within: Ctrl-C, SIGTERM and a lost terminal are passed on to the commands instead of ending this program.

        Where a lost terminal is ignored already (nohup), it stays so here and in the commands.
        """
        watched = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            watched.remove(signal.SIGHUP)

        def handle(number: int, frame: FrameType | None) -> None:
            # a thread, because the signal may come while this one holds the lock
            threading.Thread(target=self.stop, args=(number,), daemon=True).start()

        try:
            before = {number: signal.signal(number, handle) for number in watched}
        except ValueError:  # not in the main thread: Python delivers no signals here
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def lock_folder(folder: Path) -> Iterator[int]:
    """Hold the folder's lock, and give its descriptor for the commands to inherit: it is free again when all have ended.

    UserError: another study is at work in the folder.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another study is at work in {folder}, or a run of it is still ending; wait for it, or give another --out"
            ) from error
        yield file.fileno()
