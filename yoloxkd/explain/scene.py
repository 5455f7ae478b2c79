"""Images to explain, and what detectors say about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.loader import Collate
from yoloxkd.data.samples import EvalSamples
from yoloxkd.errors import UserError, nearest
from yoloxkd.kd.pairing import match_classes
from yoloxkd.nn.detector import Detector
from yoloxkd.types import Batch, ImageSize, Tap, Targets


@dataclass(frozen=True, slots=True)
class Model:
    """A detector, and its name in the figures."""

    name: str
    detector: Detector[Any, Any]

    def check_tower(self, figure: str) -> None:
        """UserError: `figure` needs a prediction at every cell, and this detector has none there."""
        spec = self.detector.spec
        if Tap.CLS not in spec.channels or not spec.stable_locations:
            raise UserError(
                f"{self.name} has no head tower that predicts at every cell, so there is no quality of its cells for the figure "
                f"'{figure}'; choose a dense detector, or only --figure attention and --figure detections"
            )

    def classes(self, names: Sequence[str]) -> torch.Tensor:
        """(names,) int64, the label of each class here, -1 where it is unknown. UserError: all are unknown."""
        indices = match_classes(names, self.detector.names)
        if not bool((indices >= 0).any()):
            raise UserError(
                f"{self.name} and the data set have no class in common: the model knows {_some(self.detector.names)}, the data set "
                f"has {_some(names)}; rename the classes in the data YAML, or choose another model"
            )
        return indices


@dataclass(frozen=True, slots=True)
class Scene:
    """One image of a data set as detectors see it.

    Attributes:
        index: position in the split
        title: name of the file
        names: class names of the data set
        batch: the image alone, with labels in the order of `names`
    """

    index: int
    title: str
    names: tuple[str, ...]
    batch: Batch

    @property
    def pixels(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB: the network input without its padding."""
        width, height = self._extent()
        return np.ascontiguousarray(self.batch.images[0, :, :height, :width].permute(1, 2, 0).cpu().numpy())

    @property
    def boxes(self) -> np.ndarray:
        """(n, 4) xyxy px, the ground truth that counts."""
        boxes: np.ndarray = self.batch.targets.boxes[0][self.batch.targets.mask[0]].cpu().numpy()
        return boxes

    @property
    def labels(self) -> np.ndarray:
        """(n,) index into `names`."""
        labels: np.ndarray = self.batch.targets.labels[0][self.batch.targets.mask[0]].cpu().numpy()
        return labels

    def on_image(self, cells: np.ndarray, height: int, width: int) -> np.ndarray:
        """A level's cells (h, w) as the image without padding has them, each cell a block of equal values: (height, width)."""
        inputs = self.batch.images.shape[-2:]
        parts = self._extent()[::-1]
        rows, columns = (
            ((np.arange(side) + 0.5) * (part / side) * (n / whole)).astype(int).clip(0, n - 1)
            for side, part, n, whole in zip((height, width), parts, cells.shape, inputs, strict=True)
        )
        shown: np.ndarray = cells[rows[:, None], columns[None, :]]
        return shown

    def targets_of(self, classes: torch.Tensor) -> Targets:
        """The ground truth with labels `classes[label]`; objects whose class is -1 do not count."""
        targets = self.batch.targets
        labels = classes.to(targets.labels.device)[targets.labels]
        return replace(targets, labels=labels.clamp_min(0), mask=targets.mask & (labels >= 0))

    def _extent(self) -> tuple[int, int]:
        x, y = self.batch.content[0, 2:].round().int().tolist()
        return max(1, x), max(1, y)


def choose_images(data: DetectionData, names: Sequence[str], count: int, seed: int) -> list[int]:
    """Positions of images in a split.

    Args:
        names: of the files, with or without folder and suffix, or positions from 0 on; none: images drawn at random
        count: how many are drawn, of those with an object
        seed: of the draw

    Raises:
        UserError: an image that is not in the split, or has no object; no image of the split has one.
    """
    objects = np.bincount(data.image_of_box()[~data.crowd], minlength=len(data))
    if not objects.any():
        raise UserError(
            f"no image of the split '{data.split}' has a box, so there is no object to explain; choose another --split"
        )
    if not names:
        some = np.flatnonzero(objects)
        sample = np.random.default_rng(seed).permutation(some)[:count]
        return sorted(sample.tolist())
    positions = [_position(data, name) for name in names]
    for index in positions:
        if not objects[index]:
            raise UserError(
                f"the image {Path(data.paths[index]).name} has no box, so there is no object to explain; choose another --image"
            )
    return list(dict.fromkeys(positions))


def _position(data: DetectionData, name: str) -> int:
    if name.isdigit() and int(name) < len(data):
        return int(name)
    files = [Path(path) for path in data.paths]
    for index, file in enumerate(files):
        if name in (file.name, file.stem, str(file)):
            return index
    raise UserError(
        f"no image {name} in the split '{data.split}'; {nearest(name, [file.name for file in files], say_all=6)}"
    )


def load_scene(
    data: DetectionData, index: int, size: ImageSize, detector: Detector[Any, Any], multiple: int | None = None
) -> Scene:
    """An image at the input size `size` px, padded as `detector` wants it, on its device. UserError: it cannot be read.

    multiple  of px that the sides of an input are, where `size` is a pair; None: the detector's own
    """
    square = isinstance(size, int)
    pad = detector.spec.input.pad_value
    sample = EvalSamples(data, size, pad, padded=square)[index]
    batch = Collate(1 if square else multiple or detector.size_multiple, pad)([sample])
    if isinstance(batch, UserError):
        raise batch
    return Scene(index, Path(data.paths[index]).name, tuple(data.names), batch.to(next(detector.parameters()).device))


@torch.no_grad()
def see(model: Model, scene: Scene) -> Any:
    """The output of a detector, in evaluation mode, for the image."""
    detector = model.detector.eval()
    return detector(scene.batch.images.to(next(detector.parameters()).device))


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
