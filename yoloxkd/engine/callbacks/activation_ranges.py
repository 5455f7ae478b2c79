"""Ranges of fake-quantized activations: they follow the training, and stay for its last part."""

from __future__ import annotations

from yoloxkd.distributed.ranks import all_mean
from yoloxkd.engine.events import Callback, State
from yoloxkd.nn.fake_quantization import ActivationQuantizer, activation_quantizers, settle


class ActivationRanges(Callback):
    """Moves the student's ranges after every step, until a part of the run is done.

    Args:
        momentum: How far a step moves them towards the extremes it saw.
        freeze: Part of the steps after which they stay, 0 to 1.
    """

    everywhere = True

    def __init__(self, momentum: float, freeze: float) -> None:
        self.momentum, self.freeze = momentum, freeze
        self.quantizers: list[ActivationQuantizer] = []

    def on_fit_start(self, state: State) -> None:
        self.quantizers = activation_quantizers(state.detector)
        self._choose(state)

    def on_step(self, state: State) -> None:
        if self.quantizers[0].observing:
            settle(self.quantizers, self.momentum, all_mean)
            self._choose(state)

    def _choose(self, state: State) -> None:
        """Observe as long as fewer steps are done than the part says."""
        observing = state.iteration < self.freeze * state.epochs * state.iters_per_epoch
        for quantizer in self.quantizers:
            quantizer.observing = observing
