"""Program that turns the exported network m.pt2 of the working folder into m.tflite; needs torch and litert-torch alone."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


def main(precision: str, float_layers: Sequence[str]) -> None:
    """Write m.tflite.

    precision     fp32, fp16 (weights alone), int8 or int8-convolutions; int8 reads images.npy (n, 3, H, W)
    float_layers  modules that int8 leaves out
    """
    import litert_torch

    plain = Path("float.tflite")
    if not plain.is_file():
        program = torch.export.load("m.pt2")
        sample = tuple(torch.full(tuple(x.shape), 114.0) for x in program.example_inputs[0])
        litert_torch.convert(program.module(), sample).export(str(plain))
    if precision == "fp32":
        plain.replace("m.tflite")
    elif precision == "fp16":
        _quantizer_of_halves(str(plain)).quantize().export_model("m.tflite", overwrite=True)
    else:
        _int8(str(plain), float_layers, everything=precision == "int8")


def _quantizer_of_halves(file: str):  # type: ignore[no-untyped-def]
    """A quantizer that keeps weights in fp16; the arithmetic stays float32."""
    from ai_edge_quantizer import qtyping, quantizer

    maker = quantizer.Quantizer(file)
    config = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    maker.update_quantization_recipe(".*", qtyping.TFLOperationName.ALL_SUPPORTED, config, "float_casting")
    return maker


def _int8(file: str, float_layers: Sequence[str], *, everything: bool) -> None:
    """Operators in int8 but for inputs, outputs and those of these layers (`backbone.stem.conv`)."""
    from ai_edge_quantizer import qtyping, quantizer

    names = qtyping.TFLOperationName
    maker = quantizer.Quantizer(file)
    for operator in (names.ALL_SUPPORTED,) if everything else (names.CONV_2D, names.DEPTHWISE_CONV_2D):
        maker.add_static_config(".*", operator, 8, 8)
    for end in (names.INPUT, names.OUTPUT):
        maker.update_quantization_recipe(".*", end, algorithm_key="no_quantize")
    for layer in float_layers:
        # a tensor is called RawHead/...CSPDarknet_backbone/...Sequential_dark2/..., a part a module
        parts = "/".join(rf"[^/]*_{re.escape(part)}" for part in layer.split("."))
        for operator in (names.CONV_2D, names.DEPTHWISE_CONV_2D):
            maker.update_quantization_recipe(f"{parts}(/|;|$)", operator, algorithm_key="no_quantize")
    maker.quantize(_ranges(file)).export_model("m.tflite", overwrite=True)


def _ranges(file: str):  # type: ignore[no-untyped-def]
    """Smallest and largest value of every tensor over images.npy; kept in ranges.pickle, for it takes minutes."""
    from ai_edge_quantizer import qtyping, quantizer

    kept = Path("ranges.pickle")
    if not kept.is_file():
        maker = quantizer.Quantizer(file)
        maker.add_static_config(".*", qtyping.TFLOperationName.ALL_SUPPORTED, 8, 8)
        images = np.load("images.npy")
        data = {"serving_default": [{"args_0": image[None]} for image in images]}
        kept.write_bytes(pickle.dumps(maker.calibrate(data, num_threads=1)))
    return pickle.loads(kept.read_bytes())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
