"""A loader process that dies is explained by how it died."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from tests.conftest import REPOSITORY
from yoloxkd.data.loader import Loader
from yoloxkd.data.worker_death import dead_worker
from yoloxkd.errors import UserError


class Doing(Dataset[Any]):
    """Four samples, the third of which does something."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 2:
            self.action()
        return index


def own_error() -> None:
    raise ValueError("hue 400\nis no hue")


def no_memory() -> None:
    raise MemoryError("Unable to allocate 9 GiB")


def dies(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _read(action: Callable[[], None], pipe: Any) -> None:
    try:
        list(Loader(Doing(action), num_workers=1, multiprocessing_context="fork"))
    except BaseException as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # torch's error may come up outside the loop over batches, where the run explains it
        told = str(error) if isinstance(error, UserError) else dead_worker(error)
        pipe.send(told or f"not a sentence: {error!r}")
    os._exit(0)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (dies(signal.SIGKILL), "was killed (Killed), mostly for want of memory; lower --workers"),
        (dies(signal.SIGBUS), "shared memory (/dev/shm)"),
        (dies(signal.SIGSEGV), "crashed (Segmentation fault)"),
        (dies(signal.SIGTERM), "ended from outside (Terminated)"),
        (lambda: os._exit(3), "by itself, with exit code 3"),
        (own_error, "failed: ValueError: hue 400 is no hue; --workers 0"),
        (no_memory, "ran out of memory"),
    ],
    ids=["kill", "bus", "segfault", "term", "exit", "exception", "memory"],
)
def test_the_sentence_says_how(action: Callable[[], None], words: str) -> None:
    context = multiprocessing.get_context(
        "fork"
    )  # torch tells of a death by a signal, which must not meet the test runner
    ours, theirs = context.Pipe()
    process = context.Process(target=_read, args=(action, theirs))
    process.start()
    assert ours.poll(60)
    sentence = ours.recv()
    process.join()
    assert words in sentence
    assert "\n" not in sentence
    assert ("for want of memory" in sentence) == ("killed" in words)


@pytest.mark.parametrize(
    ("text", "codes", "words"),
    [
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", [None, -9], "was killed (Killed)"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", [-11], "crashed (Segmentation fault)"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", [-7], "/dev/shm"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", [], "ended unexpectedly"),
        ("DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details", [], "with exit code 1"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", [], "/dev/shm"),
        ("Too many open files. Communication with the workers is no longer possible.", [], "ulimit -n"),
    ],
)
def test_what_torch_says_and_the_exit_codes_say_it_together(text: str, codes: list[int | None], words: str) -> None:
    told = dead_worker(RuntimeError(text), codes)
    assert told is not None
    assert words in told


def test_other_errors_are_left_alone() -> None:
    assert dead_worker(RuntimeError("shape mismatch")) is None
    assert dead_worker(ValueError("DataLoader worker")) is None


def test_exit_code_one_under_spawn_is_a_missing_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda *_: "forkserver")
    told = dead_worker(RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details are lost"))
    assert told is not None
    assert 'if __name__ == "__main__":' in told
    assert "'forkserver'" in told
    assert "memory" not in told


SCRIPT = """
import multiprocessing, sys
multiprocessing.set_start_method("spawn", force=True)
from tests.data.test_worker_death import Doing, nothing
from yoloxkd.data.loader import Loader
{guard}print("read", len(list(Loader(Doing(nothing), num_workers=1))))
"""


def nothing() -> None:
    """A sample without an accident."""


@pytest.mark.slow
@pytest.mark.parametrize(("guard", "words"), [("", "must stand below"), ('if __name__ == "__main__": ', "read 4")])
def test_a_spawned_program_needs_the_guard(guard: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(guard=guard))
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=300, env=env, check=False
    )
    assert words in (done.stdout + done.stderr).splitlines()[-1]
