"""Signals that reach a study at work, and what its commands get of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

STUDY = """
import sys
from pathlib import Path
from yoloxkd.study.processes import Processes

processes = Processes({})
with processes.forwarding():
    cost = processes.run([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], Path(sys.argv[2]) / "log")
print(cost.status, processes.stopped_by)
"""
"""A study with one command."""

TRAINING = """
import signal, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
def save(number, frame):
    (folder / "last.pt").write_text(signal.Signals(number).name)
    sys.exit(130)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
(folder / "ignored").write_text(str(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN))
(folder / "begun").touch()
while not (folder / "end").exists():
    time.sleep(0.02)
"""
"""Knows two signals, as a training does, and ends by itself when it is told to."""


def begin(folder: Path, *, nohup: bool) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", STUDY, TRAINING, str(folder)]
    shell = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"] if nohup else []
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"]}
    process = subprocess.Popen([*shell, *words], env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "begun").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("sent", "reaches"), [(signal.SIGHUP, "SIGTERM"), (signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")]
)
def test_a_signal_reaches_a_training_that_then_saves(tmp_path: Path, sent: signal.Signals, reaches: str) -> None:
    process = begin(tmp_path, nohup=False)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=60)
    assert said.split() == ["130", str(int(sent))]
    assert (tmp_path / "last.pt").read_text() == reaches
    assert (tmp_path / "ignored").read_text() == "False"


def test_under_nohup_a_lost_terminal_ends_nothing(tmp_path: Path) -> None:
    process = begin(tmp_path, nohup=True)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    (tmp_path / "end").touch()
    said, _ = process.communicate(timeout=60)
    assert said.split() == ["0", "None"]
    assert (tmp_path / "ignored").read_text() == "True"
    assert not (tmp_path / "last.pt").exists()
