"""A training step on CUDA tensors without data: devices, dtypes and shapes are torch's own, and no GPU is needed."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yoloxkd.ops import constants

GPU = torch.device("cuda", 0)
NMS = "torchvision.nms"
READS = (
    "_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default", "bincount", NMS,
)  # fmt: skip
"""Operations whose result, or its shape, the host waits for."""
NO_KERNEL = (
    "empty",
    "new_empty",
    "_unsafe_view",
    "detach",
    "alias",
    "lift_fresh",
    "_local_scalar_dense",
    "set_",
    "resize",
    "is_same_size",
)
PINNED = "_pinned_for_test"
FUSED = "_fused_sgd_"
"""An update in place that torch has no form without data of."""


class Watch(TorchDispatchMode):
    """Notes what runs on CUDA tensors.

    Attributes:
        launches: Operations that start a kernel, by the line of the package that asked for them.
        waits: What makes the host wait for the device, with that line.
        uploads: Copies from the host that it does not wait for, with that line.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: dict[str, int] = {}
        self.waits: list[str] = []
        self.uploads: list[str] = []

    @property
    def launched(self) -> int:
        return sum(self.launches.values())

    def launched_in(self, part: str) -> int:
        """Of these, those that lines of files with `part` in their path have asked for."""
        return sum(count for place, count in self.launches.items() if part in place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question for the device: no work
            return func(*args, **kwargs)
        name = str(func).removeprefix("aten.")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(x.device.type == "cuda" for x in inputs)
        if on_gpu and _reads(name, args, kwargs):
            self.waits.append(f"{name} at {_place()}")
        if name.startswith(FUSED):
            assert {x.device for x in inputs} == {GPU}
        out = None if name.startswith(FUSED) else func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        to_gpu = any(x.device.type == "cuda" for x in results)
        if name.startswith(("_to_copy", "copy_")):
            source = args[1] if name.startswith("copy_") else args[0]
            self._copy(name, source, results[0].device.type, args, kwargs)
            if source.device.type != results[0].device.type or on_gpu:
                self._launch()
        elif (on_gpu or to_gpu) and not func.is_view and not name.startswith(NO_KERNEL):
            self._launch()
        return out

    def _copy(self, name: str, tensor: Tensor, target: str, args: Any, kwargs: Any) -> None:
        source = tensor.device.type
        if source == target:
            return
        later = kwargs.get("non_blocking", False) or (name.startswith("copy_") and len(args) > 2 and args[2])
        if later and target == "cuda" and hasattr(tensor, PINNED):
            self.uploads.append(_place())
        else:
            self.waits.append(f"{name} from {source} to {target} at {_place()}")

    def _launch(self) -> None:
        place = _place()
        self.launches[place] = self.launches.get(place, 0) + 1


def _reads(name: str, args: Any, kwargs: Any) -> bool:
    if name.startswith("repeat_interleave.Tensor"):
        return kwargs.get("output_size") is None  # else how many there will be is read
    if name.startswith(("index.Tensor", "index_put")):
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return name.startswith(READS)


def _place() -> str:
    """The line of the package that is running; "backward" where none is."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/yoloxkd/" in file:
            return f"{file.rpartition('/yoloxkd/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _applied(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that puts new parameters in place of the old: torch's own cannot change fake ones."""
    for module in self.modules() if recurse else [self]:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    new = nn.Parameter(function(parameter), parameter.requires_grad)
                new._backward_hooks = parameter._backward_hooks
                module._parameters[key] = new
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = function(buffer)
    return self


def _pinned(self: Tensor) -> Tensor:
    setattr(self, PINNED, True)
    return self


def _copied(self: Tensor, memo: dict[int, Any]) -> Tensor:
    """`Tensor.__deepcopy__` that asks for no address."""
    with torch.no_grad():
        copy = self.detach().clone()
    memo[id(self)] = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
    return memo[id(self)]


class _Backward:
    """`Tensor.backward`, `torch.autograd.grad` and `Tensor.register_hook` without torch's engine, which asks the driver."""

    def __init__(self) -> None:
        self.hooks: dict[tuple[int, int], Any] = {}

    def register_hook(self, tensor: Tensor, hook: Any) -> None:
        assert tensor.grad_fn is not None  # parameters have theirs before the run is on the GPU
        self.hooks[tensor.grad_fn._sequence_nr(), tensor.output_nr] = hook

    def backward(self, loss: Tensor) -> None:
        """AssertionError: a gradient is not on the device of what it belongs to."""
        nodes: dict[int, Any] = {}
        gradients: dict[int, list[Tensor | None]] = {}
        latest: list[int] = []

        def send(node: Any, place: int, value: Tensor) -> None:
            shape = node._input_metadata[place]
            assert value.device == shape.device, f"{node.name()}: a gradient on {value.device} for {shape.device}"
            value = value.sum_to_size(tuple(shape.shape)).to(shape.dtype)
            if node.name() == "torch::autograd::AccumulateGrad":
                parameter = node.variable
                for hook in (parameter._backward_hooks or {}).values():
                    value = _hooked(hook, value)
                parameter.grad = value if parameter.grad is None else parameter.grad + value
                return
            number = node._sequence_nr()
            if number not in gradients:
                nodes[number], gradients[number] = node, [None] * len(node._input_metadata)
                heapq.heappush(latest, -number)
            before = gradients[number][place]
            gradients[number][place] = value if before is None else before + value

        assert loss.grad_fn is not None
        with torch.no_grad():
            send(loss.grad_fn, 0, torch.ones_like(loss))
            while latest:
                number = -heapq.heappop(latest)
                node, values = nodes.pop(number), gradients.pop(number)
                for place, value in enumerate(values):
                    if value is not None and (number, place) in self.hooks:
                        values[place] = _hooked(self.hooks[number, place], value)
                for (to, place), value in _sent_back(node, values):
                    if to is not None and value is not None:
                        send(to, place, value)

    def grad(self, loss: Tensor, inputs: Sequence[nn.Parameter], **_: Any) -> tuple[Tensor | None, ...]:
        """Of parameters; what they have gathered stays."""
        gathered = [parameter.grad for parameter in inputs]
        for parameter in inputs:
            parameter.grad = None
        self.backward(loss)
        gradients = tuple(parameter.grad for parameter in inputs)
        for parameter, gradient in zip(inputs, gathered, strict=True):
            parameter.grad = gradient
        return gradients


def _sent_back(node: Any, gradients: list[Tensor | None]) -> Iterator[tuple[tuple[Any, int], Tensor | None]]:
    """Where the gradients of a node's inputs go, with each."""
    if callable(node):
        results = node(*gradients)
        yield from zip(node.next_functions, results if isinstance(results, tuple) else (results,), strict=False)
        return
    results = node.apply(*gradients)  # one of a Python function's arguments each, tensors or not
    results = results if isinstance(results, tuple) else (results,)
    needed = [value for value, needs in zip(results, node.needs_input_grad, strict=False) if needs]
    yield from zip([edge for edge in node.next_functions if edge[0] is not None], needed, strict=True)


def _hooked(hook: Any, value: Tensor) -> Tensor:
    changed: Tensor | None = hook(value)
    return value if changed is None else changed


class _NoDriver(FakeTensorMode):
    """Never asks the driver, whatever torch believes of it; NMS, whose length is that of the kept boxes, keeps all."""

    avoid_device_init = True  # type: ignore[assignment]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(NMS):
            return args[1].argsort(descending=True)
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Tensors of `GPU` can be made and computed with; they hold no numbers, and what is read of them cannot be known."""
    engine = _Backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "_apply", _applied)
        patch.setattr(torch.Tensor, "backward", lambda loss: engine.backward(loss))
        patch.setattr(torch.autograd, "grad", engine.grad)
        patch.setattr(torch.Tensor, "register_hook", lambda tensor, hook: engine.register_hook(tensor, hook))
        patch.setattr(torch.Tensor, "__deepcopy__", _copied)
        patch.setattr(torch.Tensor, "pin_memory", _pinned)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        try:
            with _NoDriver(allow_non_fake_inputs=True):
                yield
        finally:
            constants._cached_constant.cache_clear()
