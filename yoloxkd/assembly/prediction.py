"""Prediction over one image or a whole split."""

from __future__ import annotations

import numpy as np
import torch

from yoloxkd.assembly.models import architecture, image_size, model_names
from yoloxkd.assembly.recipes import recipe_file
from yoloxkd.config.files import cfg_names
from yoloxkd.config.load import read_yaml
from yoloxkd.config.recipe import ValSection
from yoloxkd.data.augment.transforms import network_input
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.loader import eval_loader
from yoloxkd.engine.evaluate import EvalResult, evaluate
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.types import ImageMeta, ImageSize, Predictor

DEFAULT_SIZE = 640  # px, where neither the file nor the model's recipe says better


def one_input(pixels: np.ndarray, size: ImageSize, predictor: Predictor) -> tuple[torch.Tensor, ImageMeta]:
    """An image (h, w, 3) uint8 RGB as a batch of one (1, 3, H, W) uint8, and how it was letterboxed."""
    boxed, scale, left, top = network_input(pixels, size, predictor.stride, predictor.pad_value)
    tensor = torch.from_numpy(np.ascontiguousarray(boxed.transpose(2, 0, 1))[None])
    return tensor, ImageMeta(0, "", pixels.shape[0], pixels.shape[1], scale, left, top)


def measure_split(
    predictor: Predictor,
    data: DetectionData,
    size: ImageSize,
    batch: int,
    workers: int,
    settings: ValSection,
    errors: bool = False,
) -> EvalResult:
    """Metrics and detections of a predictor on a split; one image a step where the file takes no more."""
    one = isinstance(predictor, OnnxPredictor) and not predictor.dynamic_batch
    loader = eval_loader(
        data,
        imgsz=size,
        batch=1 if one else batch,
        rect=settings.rect,
        multiple=predictor.stride,
        workers=workers,
        pad_value=predictor.pad_value,
    )
    return evaluate(predictor, loader, data, backend=settings.backend, errors=errors)


def default_size(name: str) -> ImageSize:
    """The input size of a named model: what its own recipe, that of the model it is a kind of, or its family's trains at.

    `fcos-r50@torchvision` is a kind of `fcos-r50`; a number after torchvision's name is its short side, the long side twice that.
    """
    kind, _, source = name.partition("@")
    family = architecture(name)[0] if name in model_names() else kind
    _, _, short_side = source.rpartition("-")
    if short_side.isdecimal():
        return int(short_side), 2 * int(short_side)
    recipe = next((one for one in (name, kind, f"{family}-r50") if one in cfg_names("recipes")), None)
    if recipe is None:
        return DEFAULT_SIZE
    return image_size(read_yaml(recipe_file(recipe)).get("train", {}).get("imgsz")) or DEFAULT_SIZE
