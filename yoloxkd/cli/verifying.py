"""`yoloxkd verify`: an engine built elsewhere against its checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from yoloxkd.nms_defaults import IOU, MAX_DET, PREDICT_CONF


def verify(
    model: Annotated[str, typer.Argument(metavar="FILE", help="The checkpoint that the engine was made from.")],
    runner: Annotated[
        str, typer.Option(help="Command that takes image files and prints the JSON of export/predict.py.")
    ],
    data: Annotated[
        str | None, typer.Option(help="Data set to compare on. Default: the run's own, else shapes.")
    ] = None,
    imgsz: Annotated[int | None, typer.Option(help="The engine's input size in px. Default: the model's own.")] = None,
    precision: Annotated[str, typer.Option(help="Whose tolerance holds: fp32, fp16 or int8.")] = "fp32",
    conf: Annotated[float, typer.Option(min=0, max=1, help="The runner's least score.")] = PREDICT_CONF,
    iou: Annotated[float, typer.Option(min=0, max=1, help="The runner's NMS IoU threshold.")] = IOU,
    max_det: Annotated[int, typer.Option(min=1, help="The runner's largest number of detections.")] = MAX_DET,
) -> None:
    """Prove that an engine built elsewhere detects what its checkpoint detects; exit status 3 where it does not."""
    from yoloxkd.api import Detector

    Detector(model, "cpu").verify(
        runner, data=data, imgsz=imgsz, precision=precision, conf=conf, iou=iou, max_det=max_det
    )
