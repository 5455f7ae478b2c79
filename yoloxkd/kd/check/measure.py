"""Losses and gradients of a student under its teachers, over several batches, without a step of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from yoloxkd.engine.gradients import ALL, TASK_LOSS, LossGradient, average, loss_gradients, trunk
from yoloxkd.engine.parallel import preserve_statistics
from yoloxkd.engine.step import TrainStep
from yoloxkd.kd.check.concentration import Concentration, MapWatch, concentration
from yoloxkd.kd.distillation import Distill
from yoloxkd.types import TASK, Batch, Draw, LossName


@dataclass(frozen=True, slots=True)
class StudentMeasured:
    """A student under its teachers, at some weights.

    Attributes:
        weights: which: "start", or a checkpoint
        factors: {method: what its terms are multiplied by}: kd.weight, or what `auto` makes of these batches
        gradients: by loss, after that factor; sums as `engine.gradients.loss_gradients` has them
        concentration: where the methods' losses lie
    """

    weights: str
    factors: Mapping[str, float]
    gradients: Mapping[LossName, LossGradient]
    concentration: Sequence[Concentration]

    def loss_share(self, name: LossName) -> float:
        """A loss as a share of the whole training loss."""
        total = self.gradients[TASK_LOSS].loss + sum(
            one.loss for other, one in self.gradients.items() if _is_whole(other)
        )
        return self.gradients[name].loss / total if total > 0 else 0.0


def _is_whole(name: LossName) -> bool:
    return name.source != TASK and name == LossName(name.source, ALL)


def measure_student(
    step: TrainStep, distill: Distill, batches: Sequence[Batch], *, seed: int, weights: str
) -> StudentMeasured:
    """Measure the student of a set-up run as a training step would see it, batch norms on the batch's statistics.

    The student's running statistics are put back afterwards. Methods count with their full weight, without warm-up and
    decay.
    """
    for module in distill.modules:
        for method in module.methods.values():
            method.factor = 1.0
    watches = [MapWatch(module) for module in distill.modules]
    measured = []
    step.train()
    parameters = trunk(step.detector)
    with ExitStack() as stack:
        stack.enter_context(preserve_statistics(step))
        for watch in watches:
            stack.enter_context(watch.watching())
        for number, batch in enumerate(batches):
            losses = {name: loss.mean() for name, loss in step(batch, Draw(seed, number)).items()}
            measured.append(loss_gradients(losses, parameters))
            for watch in watches:
                watch.add(losses)
    mean = average(measured)
    factors = _factors(distill, mean)
    scaled = {name: one if name.source == TASK else one.times(factors[_method(name)]) for name, one in mean.items()}
    return StudentMeasured(weights, factors, scaled, concentration(watches))


def _factors(distill: Distill, mean: Mapping[LossName, LossGradient]) -> dict[str, float]:
    """Each method's factor: its number, or what makes its loss, or its gradient, `auto_share` of the task's on these batches."""
    out = {}
    for method, cfg in distill.methods.items():
        if cfg.weight != "auto":
            out[method] = float(cfg.weight)
            continue
        size = "norm" if cfg.auto == "gradient" else "loss"
        method_size = sum(
            getattr(one, size) for name, one in mean.items() if _is_whole(name) and _method(name) == method
        )
        out[method] = cfg.auto_share * getattr(mean[TASK_LOSS], size) / method_size if method_size > 0 else 1.0
    return out


def _method(name: LossName) -> str:
    """The method of a source, which has its teacher's number where there are several."""
    return name.source.partition("@")[0]
