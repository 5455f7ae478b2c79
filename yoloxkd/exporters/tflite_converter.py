"""Program that turns the exported network m.pt2 of the working folder into m.tflite; needs torch and litert-torch alone."""

from __future__ import annotations

import torch


def main() -> None:
    import litert_torch

    program = torch.export.load("m.pt2")
    sample = tuple(torch.full(tuple(x.shape), 114.0) for x in program.example_inputs[0])
    litert_torch.convert(program.module(), sample).export("m.tflite")


if __name__ == "__main__":
    main()
