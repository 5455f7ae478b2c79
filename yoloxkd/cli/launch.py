"""Launch one process for each device: `yoloxkd train --device 0,1` starts what torchrun would."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from yoloxkd.errors import UserError

INTERRUPTED = 130
PATIENCE = 60  # seconds that interrupted processes have for writing their checkpoint


def batch_size(text: str | None) -> int | str | None:
    """What `--batch` was given: a number, or auto."""
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--batch takes a number of images or auto, got '{text}'") from None


def is_lead() -> bool:
    """Whether this process speaks for all: rank zero, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def devices_of(error: UserError) -> list[str]:
    """The devices that need a process each; empty for any other error, and in a process that was launched for one of them."""
    devices = list(getattr(error, "devices", []))
    if devices:
        from yoloxkd.distributed.comm import is_launched

        return [] if is_launched() else devices
    return []


def leave_together() -> None:
    """Wait for the other processes of a distributed run: torchrun stops those that still run when the first one ends."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from yoloxkd.distributed import comm

        with contextlib.suppress(RuntimeError):
            comm.barrier()


def launch(devices: Sequence[str], arguments: Sequence[str]) -> int:
    """Run `yoloxkd ARGUMENTS` once for each device on this machine, by torchrun's own launcher; the exit status.

    That is the first status of a process that is not 0 and not the mere loss of another; 130 after Ctrl-C or SIGTERM.
    """
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each process says what went wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(devices))))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=len(devices),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=PATIENCE,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "yoloxkd", *arguments)
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 1), 1)
    return 0
