"""int8 convolutions in a float32 ncnn model, in the form that ncnn's own converter writes.

ncnn rounds a convolution's input to 8 bits, symmetrically, and gives float32 out: outputs are not rounded there.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from yoloxkd.exporters.layer_steps import WEIGHT_MOST, LayerSteps
from yoloxkd.nn.fake_quantization import CODES

_TAG = np.uint32(0x000D4B38).tobytes()
"""Before weights of int8."""
_FLOAT_TAG = bytes(4)
_ALIGN = 4
_INT8_KEY = {"Convolution": "8=2", "ConvolutionDepthWise": "8=1"}
"""Layer -> the parameter that says that steps follow its weights."""
_COUNT, _BIAS, _SIZE, _GROUPS = 0, 5, 6, 7
"""Parameters of a convolution: output channels, whether it has a bias, number of weights, groups."""


def with_int8(
    param: str, weights: bytes, steps: Mapping[str, LayerSteps], all_weights: Mapping[str, np.ndarray]
) -> tuple[str, bytes, set[str]]:
    """The text of a `.param` and the content of its `.bin` with these layers in int8, and the names of those that are so.

    One with groups of several channels stays float32: ncnn has no int8 for it.

    all_weights  of every convolution by name, float32, by which the layers of the file are told apart: it has other names"""
    names = {array.tobytes(): name for name, array in all_weights.items()}
    lines, parts, done, at = [], list[bytes](), set[str](), 0
    for line in param.splitlines():
        kind, settings = _settings(line)
        place = _next(weights, at, names, settings[_SIZE]) if kind in _INT8_KEY else None
        if place is None:
            lines.append(line)
            continue
        name, start = place
        end = start + 4 * settings[_SIZE]
        bias_end = end + 4 * settings[_COUNT] * settings.get(_BIAS, 0)
        if name not in steps or settings.get(_GROUPS, 1) not in (1, settings[_COUNT]):
            lines.append(line)
            parts.append(weights[at:bias_end])
            at = bias_end
            continue
        one = steps[name]
        codes = one.weight_codes().tobytes()
        parts += [
            weights[at : start - len(_FLOAT_TAG)],
            _TAG,
            codes,
            bytes(-len(codes) % _ALIGN),
            weights[end:bias_end],
        ]
        parts.append(_factors(one).tobytes())
        at = bias_end
        done.add(name)
        lines.append(f"{line.rstrip()} {_INT8_KEY[kind]}")
    return "\n".join([*lines, ""]), b"".join([*parts, weights[at:]]), done


def _settings(line: str) -> tuple[str, dict[int, int]]:
    """The kind of a layer, and its whole-numbered parameters."""
    words = line.split()
    if len(words) < 4:  # the file's own numbers
        return "", {}
    pairs = (word.split("=", 1) for word in words[4:] if "=" in word)
    return words[0], {int(key): int(value) for key, value in pairs if value.lstrip("-").isdigit()}


def _next(weights: bytes, at: int, names: Mapping[bytes, str], size: int) -> tuple[str, int] | None:
    """The layer of this many weights that comes first behind `at`, and where its weights begin."""
    found = [
        (start, name)
        for content, name in names.items()
        if len(content) == 4 * size and (start := weights.find(_FLOAT_TAG + content, at)) >= 0
    ]
    return (min(found)[1], min(found)[0] + len(_FLOAT_TAG)) if found else None


def _factors(one: LayerSteps) -> np.ndarray:
    """What weights (one a channel) and the input are multiplied by to become codes."""
    step, zero = one.input
    largest = max(zero * step, (CODES - zero) * step)
    factors: np.ndarray = np.append(1 / one.weight_steps, WEIGHT_MOST / largest).astype(np.float32)
    return factors
