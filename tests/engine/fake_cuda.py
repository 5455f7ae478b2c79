"""A training step on CUDA tensors without data: devices, dtypes and shapes are torch's own, and no GPU is needed."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yoloxkd.ops.constants import forget_constants

GPU = torch.device("cuda", 0)
READS = (
    "_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default", "bincount",
    "repeat_interleave.Tensor",
)  # fmt: skip
"""Operations whose result, or its shape, the host waits for."""
NO_KERNEL = (
    "empty",
    "detach",
    "alias",
    "lift_fresh",
    "_local_scalar_dense",
    "_to_copy",
    "set_",
    "resize",
    "is_same_size",
)


class Watch(TorchDispatchMode):
    """Notes what runs on CUDA tensors.

    Attributes:
        launches: Operations that start a kernel, by the line of the package that asked for them.
        waits: What makes the host wait for the device, with that line.
        uploads: Copies from the host that it does not wait for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: dict[str, int] = {}
        self.waits: list[str] = []
        self.uploads = 0

    @property
    def launched(self) -> int:
        return sum(self.launches.values())

    def launched_in(self, part: str) -> int:
        """Of these, those that lines of files with `part` in their path have asked for."""
        return sum(count for place, count in self.launches.items() if part in place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(x.device.type == "cuda" for x in inputs)
        if on_gpu and _reads(name, args):
            self.waits.append(f"{name} at {_place()}")
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        to_gpu = any(x.device.type == "cuda" for x in results)
        if name.startswith(("_to_copy", "copy_")):
            source = args[1] if name.startswith("copy_") else args[0]
            self._copy(name, source.device.type, results[0].device.type, args, kwargs)
            if source.device.type != results[0].device.type or on_gpu:
                self._launch()
        elif (on_gpu or to_gpu) and not func.is_view and not name.startswith(NO_KERNEL):
            self._launch()
        return out

    def _copy(self, name: str, source: str, target: str, args: Any, kwargs: Any) -> None:
        if source == target:
            return
        patient = kwargs.get("non_blocking", False) or (name.startswith("copy_") and len(args) > 2 and args[2])
        if patient and target == "cuda":
            self.uploads += 1
        else:
            self.waits.append(f"{name} from {source} to {target} at {_place()}")

    def _launch(self) -> None:
        place = _place()
        self.launches[place] = self.launches.get(place, 0) + 1


def _reads(name: str, args: Any) -> bool:
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
                    module._parameters[key] = nn.Parameter(function(parameter), parameter.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = function(buffer)
    return self


def backward(loss: Tensor, gradient: Tensor | None = None) -> None:
    """`Tensor.backward` without torch's engine, which asks the driver; gradients of tensors (hooks) are not called.

    AssertionError: a gradient is not on the device of what it belongs to.
    """
    assert loss.grad_fn is not None
    nodes: dict[int, Any] = {}
    waiting: dict[int, list[Tensor | None]] = {}

    def send(node: Any, place: int, value: Tensor) -> None:
        shape = node._input_metadata[place]
        assert value.device == shape.device, f"{node.name()}: a gradient on {value.device} for {shape.device}"
        value = value.sum_to_size(tuple(shape.shape)).to(shape.dtype)
        if node.name() == "torch::autograd::AccumulateGrad":
            parameter = node.variable
            parameter.grad = value if parameter.grad is None else parameter.grad + value
            return
        number = node._sequence_nr()
        if number not in waiting:
            nodes[number], waiting[number] = node, [None] * len(node._input_metadata)
            heapq.heappush(latest, -number)
        old = waiting[number][place]
        waiting[number][place] = value if old is None else old + value

    latest: list[int] = []
    send(loss.grad_fn, 0, torch.ones_like(loss) if gradient is None else gradient)
    with torch.no_grad():
        while latest:
            number = -heapq.heappop(latest)
            node, values = nodes.pop(number), waiting.pop(number)
            found = node(*values)
            for (to, place), value in zip(
                node.next_functions, found if isinstance(found, tuple) else [found], strict=False
            ):
                if to is not None and value is not None:
                    send(to, place, value)


class _NoDriver(FakeTensorMode):
    """Never asks the driver, whatever torch believes of it."""

    avoid_device_init = True  # type: ignore[assignment]


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Tensors of `GPU` can be made and computed with; they hold no numbers, and what is read of them cannot be known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "_apply", _applied)
        patch.setattr(torch.Tensor, "backward", backward)
        patch.setattr(torch.Tensor, "pin_memory", lambda x: x)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        try:
            with _NoDriver(allow_non_fake_inputs=True):
                yield
        finally:
            forget_constants()
