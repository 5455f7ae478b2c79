"""Explain why a loader process died."""

from __future__ import annotations

import multiprocessing
import re
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from yoloxkd.errors import UserError

_LESS = "lower --workers, --batch or --imgsz"
_SHARED = (
    "a loader process ran out of shared memory (/dev/shm); lower --workers or --batch, or give the system more of it (for "
    "Docker: --shm-size)"
)
_MEMORY = ("out of memory", "insufficient memory", "allocate memory")
_SHARED_SIGNS = ("bus error", "shared memory", "shm", "</torch_")


def dead_worker(error: BaseException, exit_codes: Iterable[int | None] = ()) -> str | None:
    """The sentence for a loader process that died or raised, or None for any other error.

    exit_codes  of the loader processes, where they are known: negative ones are signals
    torch notices a death by a signal, so its error may come up anywhere in the program, not only while waiting for a
    batch. It then says the signal or the exit code itself.
    """
    text = str(error)
    if exception_match := re.match(r"Caught (\w+) in DataLoader worker process", text):
        return _exception_sentence(exception_match[1], text)
    if isinstance(error, RuntimeError) and text.startswith("Too many open files"):
        return "the loader processes need more open files than the system allows; lower --workers, or raise 'ulimit -n'"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return _death_sentence(text, [code for code in exit_codes if code])
    return None


def _exception_sentence(kind: str, text: str) -> str:
    """A worker's own exception, which comes with its traceback as text."""
    if kind == "MemoryError" or any(words in text.lower() for words in _MEMORY):
        return f"a loader process ran out of memory; {_LESS}"
    *_, last = re.split(r"\n(?=[A-Za-z_][\w.]*(?::|$))", text.rstrip(), flags=re.MULTILINE)
    what = " ".join(last.split())
    if any(sign in what.lower() for sign in _SHARED_SIGNS):
        return _SHARED
    return f"a loader process failed: {what}; --workers 0 reads the images in this process and shows where"


def _death_sentence(text: str, exit_codes: list[int]) -> str:
    if any(sign in text.lower() for sign in _SHARED_SIGNS) or -signal.SIGBUS in exit_codes:
        return _SHARED
    signal_match, code = re.search(r"killed by signal: ([^.]+)", text), re.search(r"exit code (\d+)", text)
    name = signal_match[1].strip() if signal_match else ""
    number = int(code[1]) if code else next(iter(exit_codes), None)
    if not name and number is not None and number < 0:
        name, number = signal.strsignal(-number) or f"signal {-number}", None
    if name.startswith("Killed"):
        return f"a loader process was killed ({name}), mostly for want of memory; {_LESS}"
    if name in ("Terminated", "Interrupt", "Hangup"):
        return f"a loader process was ended from outside ({name})"
    if name:
        return (
            f"a loader process crashed ({name}) inside a library that reads or changes images; 'yoloxkd data check' finds "
            "an image that does so, --workers 0 shows where"
        )
    if number == 1 and multiprocessing.get_start_method() != "fork":
        return main_guard()
    how = "unexpectedly" if number is None else f"by itself, with exit code {number}"
    return (
        f"a loader process ended {how}; its own message is above, if it had one, and --workers 0 reads the images in this "
        "process and shows where"
    )


def main_guard() -> str:
    """What a program needs where processes are not forked: they import its main file first."""
    method = multiprocessing.get_start_method()
    head = (
        f"a loader process could not start: with the start method '{method}' it imports the program's main file first"
    )
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is not None and not Path(file).is_file():
        return f"{head}, and there is none for a program from standard input; write it to a file, or use workers=0"
    return f'{head}, so what that file runs must stand below a line `if __name__ == "__main__":`; or use workers=0'


def refuse_while_starting() -> None:
    """UserError in a process that is just importing the main file of the program that started it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(main_guard())
