"""Process groups: start, broadcast, gather, barrier, and failures that all ranks share.

torchrun starts them and says in the environment who each one is; the rest is `torch.distributed`. Tensors of a CUDA device
go through NCCL, everything else (plain objects, signals) through gloo, so that agreeing never waits for a device.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from yoloxkd.distributed.ranks import rank, rank_and_world_size, single_process, world_size
from yoloxkd.errors import UserError

__all__ = ["rank", "rank_and_world_size", "single_process", "world_size"]

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others before it gives up; one that has died is noticed at once."""
_LOST = (
    "connection closed by peer", "connection reset", "broken pipe", "socket", "timed out", "timeout", "gloo", "nccl",
)  # fmt: skip
_PATIENT = timedelta(days=1)
"""The same while one process of a machine does something long, such as a download."""
_started_here = False
_nccl = False
_failed = False


class PeerLost(UserError):
    """Another process of a distributed run has ended, so this one cannot go on. The command line exits 1."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class LocalRanks:
    """Where this process is: number and count on its machine, restarts of the launch so far and at most."""

    local_rank: int
    local_world_size: int
    restarts: int
    max_restarts: int


def local_ranks() -> LocalRanks:
    """As torchrun says; for processes started in another way, all are taken to be on one machine."""
    env = os.environ
    return LocalRanks(
        int(env.get("LOCAL_RANK", rank())),
        int(env.get("LOCAL_WORLD_SIZE", world_size())),
        int(env.get("TORCHELASTIC_RESTART_COUNT", 0)),
        int(env.get("TORCHELASTIC_MAX_RESTARTS", 0)),
    )


def is_launched() -> bool:
    """Whether torchrun (or something that speaks like it) has started this process among others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


def init_process_group() -> None:
    """Meet the other processes, where there are any and they have not met yet."""
    global _started_here, _nccl
    if not is_launched() or distributed.is_initialized():
        return
    _nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    with peer_errors():
        store, number, count = next(distributed.rendezvous("env://", timeout=TIMEOUT))  # type: ignore[attr-defined]
        # torchrun keeps its store over restarts: without a prefix a new process could read the address of a dead one
        fresh = distributed.PrefixStore(f"yoloxkd/{local_ranks().restarts}/{count}", store)  # type: ignore[attr-defined]
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if _nccl else "gloo", store=fresh, rank=number, world_size=count, timeout=TIMEOUT
        )
    _started_here = True
    atexit.register(_stop)


def _stop() -> None:
    """Leave. NCCL would wait here for what a failed run has left under way, so it is not asked to."""
    if _started_here and distributed.is_initialized() and not (_nccl and _failed):
        distributed.destroy_process_group()


def broadcast(value: T) -> T:
    """Rank zero's value, in every process. For plain objects."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    distributed.broadcast_object_list(box, src=0)
    received: T = box[0]
    return received


def gather(value: T) -> list[T]:
    """Everybody's value by rank, in every process. For plain objects."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def gather_to_main(value: T) -> list[T]:
    """Everybody's value by rank in rank zero; an empty list elsewhere. For plain objects, large ones too."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    distributed.gather_object(value, values, dst=0)
    return values or []


def all_reduce_max(number: int) -> int:
    """The largest of everybody's numbers, in every process."""
    if world_size() == 1:
        return number
    value = torch.tensor(number)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return int(value)


def barrier() -> None:
    """Until every process is here."""
    all_reduce_max(0)


def check_alike(value: object, sentence: str) -> None:
    """UserError with the sentence, in every process, unless all have an equal value."""
    values = gather(value)
    if any(other != values[0] for other in values):
        error = UserError(sentence)
        error.agreed = True
        raise error


@contextmanager
def all_or_none() -> Iterator[None]:
    """What is done inside succeeds in all processes or, with the sentence of the first that failed, in none.

    There must be nothing inside that waits for other processes.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    outcomes = gather((str(failure), failure.exit_code) if failure else None)
    bad = [number for number, outcome in enumerate(outcomes) if outcome is not None]
    if not bad:
        return
    text, code = outcomes[bad[0]] or ("", 2)
    alike = all(outcome == outcomes[0] for outcome in outcomes)
    if failure is None or not alike:
        cause, failure = failure, UserError(f"process {bad[0]} of {len(outcomes)}: {text}")
        failure.exit_code = code
        failure.__cause__ = cause
    failure.agreed = True
    raise failure


@contextmanager
def local_main_first() -> Iterator[None]:
    """One process of each machine goes first (it may download something), the others follow when it is done."""
    if world_size() == 1:
        yield
        return
    leads = local_ranks().local_rank == 0
    patient: Any = distributed.new_group(backend="gloo", timeout=_PATIENT)
    if not leads:
        distributed.barrier(patient)
    try:
        yield
    finally:
        if leads:
            distributed.barrier(patient)
        distributed.destroy_process_group(patient)


@contextmanager
def peer_errors() -> Iterator[None]:
    """A lost connection to another process becomes a PeerLost."""
    try:
        yield
    except BaseException as error:
        lost = peer_lost(error)
        if lost is not None:
            raise lost from error
        raise


def peer_lost(error: BaseException) -> PeerLost | None:
    """The sentence for an error that means that another process of this run is gone; None for any other error."""
    global _failed
    if not is_launched() and world_size() == 1:
        return None
    _failed = not (isinstance(error, UserError) and error.agreed)
    text = str(error).lower()
    if not isinstance(error, RuntimeError) or not any(sign in text for sign in _LOST):
        return None
    number = os.environ.get("RANK", str(rank()))
    return PeerLost(
        f"process {number} lost another process of this run, which has failed (see its own message) or was killed; "
        "the last checkpoint is intact"
    )
