"""Program that turns the exported network m.pt2 in the working folder into m.tflite; needs torch and litert-torch alone."""

from __future__ import annotations

import sys

import torch


def main(precision: str) -> None:
    """precision: fp32, or fp16 for half the size."""
    import litert_torch

    program = torch.export.load("m.pt2")
    sample = tuple(torch.full(tuple(x.shape), 114.0) for x in program.example_inputs[0])
    litert_torch.convert(program.module(), sample).export("m.tflite")
    if precision == "fp16":
        _to_half()


def _to_half() -> None:
    """Weights of convolutions in fp16; the arithmetic stays float32."""
    from ai_edge_quantizer import qtyping, quantizer

    maker = quantizer.Quantizer("m.tflite")
    maker.update_quantization_recipe(
        regex=".*",
        operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
        op_config=qtyping.OpQuantizationConfig(
            weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        ),
        algorithm_key="float_casting",
    )
    maker.quantize().export_model("m.tflite", overwrite=True)


if __name__ == "__main__":
    main(sys.argv[1])
