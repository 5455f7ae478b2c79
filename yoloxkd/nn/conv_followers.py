"""What reads the output of each convolution, seen in a forward pass instead of guessed from names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from yoloxkd.nn.detector import Detector


def norms_after(detector: Detector[Any, Any]) -> dict[nn.Conv2d, nn.BatchNorm2d | None]:
    """The convolutions that run, each with the batch norm that can be folded into it.

    A convolution that feeds two different norms, or a norm fed by two convolutions, makes no pair.
    """
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    visited: dict[nn.Conv2d, None] = {}
    pairs: set[tuple[nn.Conv2d, nn.BatchNorm2d]] = set()

    def after_conv(module: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made[id(output)] = (module, output)  # the tensor is kept, so that its id is not given to another
        visited[module] = None

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        if rest_of(module) is not None and id(inputs[0]) in made:
            pairs.add((made[id(inputs[0])][0], module))

    hooks = [m.register_forward_hook(after_conv) for m in detector.modules() if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(before_norm) for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    _forward(detector)
    for hook in hooks:
        hook.remove()
    convolutions, norms = [conv for conv, _ in pairs], [norm for _, norm in pairs]
    single = {c: n for c, n in pairs if convolutions.count(c) == norms.count(n) == 1}
    return {conv: single.get(conv) for conv in visited}


def rest_of(norm: nn.BatchNorm2d) -> nn.Module | None:
    """What a norm does besides normalizing: timm's own kind has an activation inside. None: a kind not known here."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    inside = dict(norm.named_children())
    return inside["act"] if inside.keys() == {"drop", "act"} else None


def replace_modules(root: nn.Module, new: Mapping[nn.Module, nn.Module | None]) -> None:
    """Put another module wherever one of `new` lies, in `root` or in another new one: {module: what replaces it}."""
    for module in [*root.modules(), *(made for made in new.values() if made is not None)]:
        for name, child in list(module.named_children()):
            if child in new:
                setattr(module, name, new[child])


def readers_of(detector: Detector[Any, Any], layers: Mapping[nn.Module, str]) -> dict[str, set[str]]:
    """Names of the torch functions that read the output of each of `layers` (module -> its name in the result).

    That of `hardtanh` has its limits behind it: "hardtanh 0 6" is ReLU6.
    """
    mode = _Readers()

    def after(module: nn.Module, _: Any, output: Tensor) -> None:
        mode.made[id(output)] = (layers[module], output)
        mode.readers.setdefault(layers[module], set())

    hooks = [module.register_forward_hook(after) for module in layers]
    with mode:
        _forward(detector)
    for hook in hooks:
        hook.remove()
    return mode.readers


class _Readers(TorchFunctionMode):
    """Notes which functions get the tensors in `made`. One written in place is another tensor from there on."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[str, Tensor]] = {}
        self.readers: dict[str, set[str]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "hardtanh" and kwargs:
            name += f" {kwargs['min_val']:g} {kwargs['max_val']:g}"
        if name != "__get__":  # attributes such as the shape
            for argument in _tensors([*args, *(kwargs or {}).values()]):
                if id(argument) in self.made:
                    self.readers[self.made[id(argument)][0]].add(name)
                    if result is argument:
                        del self.made[id(argument)]
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _forward(detector: Detector[Any, Any]) -> None:
    """A pass over a small black image, in evaluation mode and without gradient."""
    side = 2 * detector.size_multiple
    parameter = next(detector.parameters())
    with torch.no_grad(), evaluating(detector):
        detector(torch.zeros(1, 3, side, side, device=parameter.device))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training
