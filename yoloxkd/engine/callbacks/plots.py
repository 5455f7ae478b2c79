"""`plots/`: training curves, and predictions beside the ground truth, drawn once at the end of a run."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from yoloxkd.data.records import DetectionData
from yoloxkd.data.transforms import network_input
from yoloxkd.engine.callbacks.csv_log import read_rows
from yoloxkd.engine.evaluate import TorchPredictor, to_original
from yoloxkd.engine.events import Callback, State
from yoloxkd.types import Detections, ImageMeta

PICTURES = 6
SHOWN_ABOVE = 0.3  # score


class Plots(Callback):
    """curves.png from results.csv, predictions.png from the last student (its averaged weights) on validation images.

    A plot that cannot be written is a warning: the trained student matters more.
    """

    def __init__(self, val: DetectionData) -> None:
        self.val = val

    def on_fit_end(self, state: State) -> None:
        from yoloxkd.viz.curves import draw_curves  # matplotlib costs a second to import

        folder = state.out / "plots"
        try:
            folder.mkdir(exist_ok=True)
            draw_curves(read_rows(state.out / "results.csv"), folder / "curves.png")
            cv2.imwrite(str(folder / "predictions.png"), cv2.cvtColor(self._sheet(state), cv2.COLOR_RGB2BGR))
        except (OSError, cv2.error) as error:
            state.say(f"warning: plots were not drawn ({error})")

    def _sheet(self, state: State) -> np.ndarray:
        from yoloxkd.viz.mosaic import truth_beside_prediction

        model = state.ema.module if state.ema else state.detector
        predictor = TorchPredictor(model, conf=SHOWN_ABOVE, max_det=100, device=state.device)
        images, truths, predictions = [], [], []
        size = state.recipe.train.imgsz
        for i in range(min(PICTURES, len(self.val))):
            pixels = self.val.read(i)
            boxes, labels, _ = self.val.annotations(i)
            boxed, scale, left, top = network_input(pixels, size, predictor.stride, predictor.pad_value)
            found = predictor(torch.from_numpy(np.ascontiguousarray(boxed.transpose(2, 0, 1))[None]))[0]
            meta = ImageMeta(0, "", pixels.shape[0], pixels.shape[1], scale, left, top)
            images.append(pixels)
            truths.append(Detections(boxes, np.ones(len(boxes), np.float32), labels, self.val.names))
            predictions.append(to_original(found, meta))
        return truth_beside_prediction(images, truths, predictions)
