"""Memory freed in a training step on the CPU stays with the process, and goes back afterwards."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from yoloxkd.config.recipe import EngineSection
from yoloxkd.engine.device import settings

BLOCK = 96  # MiB
pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None) if os.name == "posix" else None, "gnu_get_libc_version"), reason="needs glibc"
)


def faults() -> int:
    """Pages that the system gives for one large tensor."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(BLOCK, 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20


def look(inside: object) -> None:
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of the usual size, whatever the system does
    found = {"outside": faults(), "before": resident()}
    with settings(EngineSection(), torch.device("cpu")):
        # what is freed may be cut for something small, and the next block then lies elsewhere
        found["inside"], found["held"] = min([faults() for _ in range(6)][1:]), resident()
    found["after"], found["outside again"] = resident(), faults()
    inside.put(found)  # type: ignore[attr-defined]


def of_a_process() -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=look, args=(queue,))
    process.start()
    found: dict[str, int] = queue.get(timeout=120)
    process.join()
    return found


@pytest.mark.slow
def test_a_run_keeps_what_it_frees_and_returns_it_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    found = of_a_process()
    assert found["outside"] > 1000, found
    assert found["inside"] < 100, found
    assert found["held"] - found["before"] > BLOCK * 0.9, found
    assert found["after"] - found["before"] < BLOCK * 0.2, found
    assert found["outside again"] > 1000, found


@pytest.mark.slow
def test_the_users_own_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
    assert of_a_process()["inside"] > 1000
