"""Set up a training run, and make its optimization steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from yoloxkd.config.recipe import Recipe
from yoloxkd.distributed.comm import rank_and_world_size
from yoloxkd.engine.device import (
    amp_dtype,
    fused_optimizer,
    grad_scaler,
    memory_format,
    resolved_amp,
    synchronized_norms,
    tries_largest_size,
)
from yoloxkd.engine.ema import ModelEMA
from yoloxkd.engine.events import State
from yoloxkd.engine.failures import memory_advice
from yoloxkd.engine.multiscale import largest_size, size_at
from yoloxkd.engine.optim import learning_rate, optimizer
from yoloxkd.engine.parallel import average_statistics, gradients, preserve_statistics, wrapped
from yoloxkd.engine.resume import restore
from yoloxkd.engine.step import TrainStep
from yoloxkd.types import Batch, Draw, LossName

REMEDY = "lower --batch or --imgsz, use --amp bf16, or take a batch in parts with train.accumulate"


class Stepper:
    """Makes optimization steps of a run, one batch at a time; it knows nothing of epochs and loaders.

    Args:
        state: Of the run, with its callbacks.

    Example:
        stepper = Stepper(state)
        stepper.set_up()
        stepper.step(batch)
    """

    step_module: nn.Module

    def __init__(self, state: State) -> None:
        self.state = state
        self.recipe: Recipe = state.recipe
        self._largest_fits = False  # not tried yet

    def set_up(self, resume: Mapping[str, Any] | None = None) -> None:
        """Make optimizer, gradient scaler and averaged weights, after the callbacks have added their losses.

        Args:
            resume: A loaded last.pt, which the run goes on from.

        Raises:
            UserError: It is not of this run.
        """
        state, recipe = self.state, self.recipe
        if resume is not None:
            state.callbacks.load_state_dict(resume["run"]["callbacks"])
        state.callbacks.call(lambda callback: callback.on_setup(state))
        amp = amp_dtype(recipe.engine.amp, state.device)
        if recipe.engine.amp == "auto" and amp is not None:
            state.say(f"amp auto: {resolved_amp('auto', state.device)} on {state.device}")
        state.detector.to(state.device)
        state.aux.to(state.device)
        self.memory_format = memory_format(recipe.engine.channels_last, state.detector, state.device)
        state.detector.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        if recipe.engine.sync_bn:
            synchronized_norms(state.detector, state.device)
        self.step_module = wrapped(TrainStep(state.detector, state.aux, amp))
        fused, rate = fused_optimizer(state.device), self._learning_rate(0)
        state.optimizer = optimizer([state.detector, state.aux], rate, recipe.optim, fused)
        state.scaler = grad_scaler(amp, state.device)
        if recipe.ema.enabled:
            state.ema = ModelEMA(state.detector, decay=recipe.ema.decay, ramp=recipe.ema.ramp)
        if resume is not None:
            restore(state, resume)
        if recipe.engine.compile:
            state.detector.compile()

    def step(self, batch: Batch) -> None:
        """Train on a batch: losses, gradients, optimizer, averaged weights, with the callbacks of each.

        Args:
            batch: This process' images of the step, on any device.
        """
        state, recipe = self.state, self.recipe
        batch = self._laid_out(batch.to(state.device))
        if not self._largest_fits:
            self._try_largest(batch)
        batch = self._resized(batch)
        state.batch = replace(batch, place=rank_and_world_size())
        state.lr = self._learning_rate(state.iteration)
        assert state.optimizer is not None
        for group in state.optimizer.param_groups:
            group["lr"] = state.lr * group.get("lr_factor", 1.0)
        state.callbacks.call(lambda callback: callback.on_batch_start(state))
        with memory_advice(
            f"a training step of {recipe.train.batch} images of {batch.images.shape[2]}x{batch.images.shape[3]} px",
            REMEDY,
        ):
            state.optimizer.zero_grad(set_to_none=True)
            draw = Draw(recipe.train.seed, state.iteration)
            parts = [state.batch.part(number, state.parts) for number in range(state.parts)]
            state.losses = gradients(self.step_module, parts, draw, self._backward, self._losses_of_part)
            self._optimize(state.optimizer)
        state.sums = _added(state.sums, state.losses)
        state.step_in_epoch += 1
        state.iteration += 1
        average_statistics(self.step_module)
        if state.ema:
            state.ema.update(state.detector)
        state.callbacks.call(lambda callback: callback.on_step(state))

    def _try_largest(self, batch: Batch) -> None:
        """Losses and gradients of a batch at the largest size that multi-scale training draws, of which nothing is kept.

        So a GPU whose memory is too small for it says so before the first step, not after minutes. UserError: it is.
        """
        self._largest_fits = True
        state, recipe = self.state, self.recipe
        if not tries_largest_size(state.device) or not isinstance(recipe.train.imgsz, int):
            return
        steps, stride = recipe.augment.multiscale, state.detector.size_multiple
        size = largest_size(imgsz=recipe.train.imgsz, steps=steps, stride=stride)
        if size <= batch.images.shape[-1]:
            return
        batch = replace(batch.resized(size), place=rank_and_world_size())
        parts = [batch.part(number, state.parts) for number in range(state.parts)]
        doing = f"a trial step of {recipe.train.batch} images of {size}x{size} px, the largest that multi-scale draws"
        with memory_advice(doing, f"{REMEDY}, or lower augment.multiscale"), preserve_statistics(self.step_module):
            gradients(self.step_module, parts, Draw(recipe.train.seed), self._backward, lambda part, losses: losses)
        assert state.optimizer is not None
        state.optimizer.zero_grad(set_to_none=True)

    def _laid_out(self, batch: Batch) -> Batch:
        """The batch with images in the run's memory format: a convolution follows its input's, not only its weights'."""
        return replace(batch, images=batch.images.contiguous(memory_format=self.memory_format))

    def _resized(self, batch: Batch) -> Batch:
        """The batch in the size that multi-scale training has now."""
        state, recipe = self.state, self.recipe
        if not isinstance(recipe.train.imgsz, int):
            return batch
        size = size_at(
            state.iteration,
            imgsz=recipe.train.imgsz,
            steps=recipe.augment.multiscale,
            stride=state.detector.size_multiple,
            seed=recipe.train.seed,
        )
        return batch.resized(size)

    def _losses_of_part(self, part: int, losses: dict[LossName, Tensor]) -> dict[LossName, Tensor]:
        """The terms whose sum is the loss of a part of the batch, when the callbacks have seen them."""
        state = self.state
        state.part, state.losses = part, losses
        state.callbacks.call(lambda callback: callback.on_losses(state))
        return state.losses

    def _backward(self, total: Tensor) -> None:
        scaler = self.state.scaler
        (scaler.scale(total) if scaler else total).backward()

    def _optimize(self, optimizer: torch.optim.Optimizer) -> None:
        scaler, clip = self.state.scaler, self.recipe.optim.clip_norm
        if clip is not None:
            if scaler:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()

    def _learning_rate(self, iteration: int) -> float:
        return learning_rate(self.recipe, iteration, self.state.iters_per_epoch)


def _added(sums: dict[LossName, Tensor], losses: dict[LossName, Tensor]) -> dict[LossName, Tensor]:
    """The sums with a step's losses added, on CUDA in one launch for all."""
    names = [name for name in losses if name in sums]
    totals = torch._foreach_add([sums[name] for name in names], [losses[name] for name in names]) if names else ()
    return sums | losses | dict(zip(names, totals, strict=True))
