"""Inheriting (FGD): initialize the student's neck and head from the teacher's where shapes agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from yoloxkd.nn.detector import Detector

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@torch.no_grad()
def inherit_from(teacher: Detector[Any, Any], student: Detector[Any, Any]) -> list[str]:
    """Copy the teacher's neck and head into the student, layer by layer; returns the names of those layers.

    A layer is taken when all its tensors have the same shapes in both. A normalization is taken only with the layers
    beside it, whose output it has statistics of; a class predictor only when both detectors have the same class names.
    """
    modules = dict(student.named_modules())
    teacher_modules = dict(teacher.named_modules())
    names = [n for n in modules if _tensors(modules[n]) and n in teacher_modules and not _in_backbone(n, modules)]
    names = [n for n in names if not f"{n}.".startswith(student.run_state)]
    if list(student.names) != list(teacher.names):
        names = [n for n in names if not _predicts_class(n, modules[n], student)]
    agree = {n for n in names if _shapes(modules[n]) == _shapes(teacher_modules[n])}
    layers = [n for n in names if n in agree and (not isinstance(modules[n], NORMS) or _siblings(n, modules) <= agree)]
    for name in layers:
        for key, value in _tensors(modules[name]).items():
            value.copy_(_tensors(teacher_modules[name])[key])
    return layers


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and buffers, without its children's."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in _tensors(module).items()}


def _in_backbone(name: str, modules: Iterable[str]) -> bool:
    """YOLOX's released key names put the neck at `backbone` and the backbone proper inside it."""
    nested = any(m.startswith("backbone.backbone.") for m in modules)
    return name.startswith("backbone.backbone." if nested else "backbone.")


def _predicts_class(name: str, module: nn.Module, student: Detector[Any, Any]) -> bool:
    """A detector may name its class predictors in `class_predictors`; else they are told by one output a class."""
    prefixes: tuple[str, ...] = getattr(student, "class_predictors", ())
    if prefixes:
        return f"{name}.".startswith(prefixes)
    weight = _tensors(module).get("weight")
    return weight is not None and weight.shape[0] == len(student.names)


def _siblings(name: str, modules: dict[str, nn.Module]) -> set[str]:
    """Layers under the same parent that hold tensors and are no normalization."""
    parent = name.rpartition(".")[0]
    return {
        m
        for m, module in modules.items()
        if m.rpartition(".")[0] == parent and _tensors(module) and not isinstance(module, NORMS)
    }
