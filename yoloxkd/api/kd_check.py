"""`kd_check`: measure a distillation before it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

from yoloxkd.assembly.arguments import device_name, references, whole_number
from yoloxkd.assembly.kd_check import KDCheck, check_distillation
from yoloxkd.assembly.recipes import resolve
from yoloxkd.errors import UserError
from yoloxkd.types import ImageSize

MOST_BATCHES = 1000


def kd_check(
    student: str | None = None,
    teacher: str | Sequence[str] | None = None,
    kd: str | Sequence[str] | None = None,
    data: str | None = None,
    checkpoint: str | None = None,
    batches: int = 4,
    batch: int | None = None,
    imgsz: ImageSize | None = None,
    device: str | int | torch.device | None = None,
    seed: int | None = None,
    recipe: str | None = None,
    set: Mapping[str, Any] | Sequence[str] = (),
    console: Console | None = None,
) -> KDCheck:
    """Say what distilling as set would do to the student: losses, gradients, floor, findings. Nothing is trained or written.

    Args:
        student, teacher, kd, data, batch, imgsz, device, seed, recipe, set: as for `Trainer`.
        checkpoint: weights of the same student, at which everything is measured once more.
        batches: training batches that are measured, of at most 16 images.
        console: a rich console for what is said on the way; None: nothing is.

    Returns:
        The numbers, `findings` with the setting that helps, `verdict` in words, and `harm`.

    Raises:
        GateError: a teacher does not reach `teacher.min_ap`.
        UserError: an argument cannot be used, or the pair cannot be distilled so.

    Example:
        >>> check = kd_check("yolox-nano", "teacher.pt", "pgd", "my.yaml", imgsz=320)
        >>> print(check.verdict)
    """
    references(student=student, teacher=teacher, kd=kd, data=data, checkpoint=checkpoint, recipe=recipe)
    batches = whole_number("batches", batches, 1, MOST_BATCHES)
    resolved = resolve(
        student=student,
        teacher=_list(teacher) or (),
        kd=_list(kd),
        recipe=recipe,
        sets=set,
        data=data,
        batch=batch,
        imgsz=imgsz,
        device=None if device is None else device_name(device),
        seed=seed,
    )
    if "," in resolved.engine.device:
        raise UserError(f"--device {resolved.engine.device}: kd-check runs on one device; name one of them")
    return check_distillation(resolved, checkpoint=checkpoint, batches=batches, console=console)


def _list(value: str | Sequence[str] | None) -> list[str] | None:
    return None if value is None else [value] if isinstance(value, str) else list(value)
