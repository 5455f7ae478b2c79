"""Batch size of a step: the real number of images, and whether batch norms can train on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from yoloxkd.config.recipe import Recipe
from yoloxkd.data.augment.transforms import up_to_multiple
from yoloxkd.errors import UserError
from yoloxkd.nn.detector import Detector


def batch_per_process(batch: int, processes: int, parts: int, images: int) -> int:
    """Images of a batch for each process. UserError: they cannot be shared equally."""
    least = processes * parts
    if batch % least:
        lower, upper = batch // least * least, -(-batch // least) * least
        raise UserError(
            f"train.batch {batch} is the number of images of a step over all processes and parts, and it cannot be shared "
            f"equally by {processes} process(es) of {parts} part(s); use {f'{lower} or ' if lower else ''}{upper}"
        )
    share = max(1, images // processes)
    if images < batch and share % parts:
        raise UserError(
            f"the {images} training images, fewer than train.batch {batch}, cannot be taken in {parts} equal parts by "
            f"each of {processes} process(es); lower train.accumulate"
        )
    return min(batch // processes, share)


def with_real_batch(recipe: Recipe, images: int, processes: int, say: Callable[[str], None]) -> Recipe:
    """The recipe with the batch that so many training images make, which learning rate and images/s then follow."""
    requested = recipe.train.batch
    actual = batch_per_process(requested, processes, recipe.train.accumulate, images) * processes
    if actual == requested:
        return recipe
    rate = recipe.optim.lr_per_image
    say(
        f"note: {images} training images are too few for train.batch {requested}: {actual} images a step, and the "
        f"learning rate is that of {actual} (at most {rate * actual:.4g} instead of {rate * requested:.4g})"
    )
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch": actual})})


def takes_one_image(student: Detector[Any, Any], side: int) -> bool:
    """Whether a training step on one image of `side` px works: batch norm cannot take a single value a channel."""
    if side > max(student.spec.strides):  # at least four cells everywhere
        return True
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(student).cpu().train()(torch.zeros(1, 3, side, side))
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            return False
        raise
    return True


def check_batch_norm(student: Detector[Any, Any], recipe: Recipe, processes: int) -> None:
    """UserError where a step of this recipe, its batch being the real one, is one image too small for batch norm."""
    train = recipe.train
    if train.batch > processes * train.accumulate or (recipe.engine.sync_bn and processes > 1):
        return
    stride = student.size_multiple
    if isinstance(train.imgsz, int):
        side = train.imgsz if recipe.augment.multiscale == (0, 0) else max(2 * stride, train.imgsz)
    else:
        side = min(recipe.augment.short_sides or (train.imgsz[0],))
    side = up_to_multiple(side, stride)
    if takes_one_image(student, side):
        return
    raise UserError(
        f"a step on one image of {side} px leaves a single cell at stride {stride}, which batch norm cannot be trained on: "
        f"use --imgsz {2 * stride} or more, or two images or more for each process and each part of a step (here --batch "
        f"{train.batch}, {processes} process(es), train.accumulate {train.accumulate})"
    )
