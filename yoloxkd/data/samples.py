"""Samples of a split. A training sample is a pure function of (seed, epoch, index, strong)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from torch.utils.data import Dataset

from yoloxkd.config.augment import Augment
from yoloxkd.data.augment.mosaic import mixup, mosaic
from yoloxkd.data.augment.placed_mask import placed_masks
from yoloxkd.data.augment.transforms import Color, Sample, color, fit_size, flip, letterbox, worth_training
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.io.image_caches import RecentImages
from yoloxkd.data.sampler import Key, epoch_order
from yoloxkd.errors import UserError
from yoloxkd.types import ImageMeta, ImageSize

GRAY: Color = (114, 114, 114)


@dataclass
class TrainSamples(Dataset[Sample | UserError]):
    """Augmented samples of a split by (epoch, index, strong).

    strong   mosaic and mixup, by their probabilities; without it, and where no mosaic is drawn: letterbox, color, flip
    imgsz    size of the network input; samples of a pair are as large as their image, not padded
    An image that cannot be read is given back as its UserError: raised, it would lose its sentence between processes.
    """

    data: DetectionData
    imgsz: ImageSize
    augment: Augment
    seed: int
    pad_value: Color = GRAY

    def __post_init__(self) -> None:
        counts = np.bincount(np.repeat(np.arange(len(self.data)), np.diff(self.data.offsets)), ~self.data.crowd)
        self.with_boxes = np.flatnonzero(counts)
        self._epoch = -1
        if self.data.cache is None and self.augment.mosaic and self.augment.mosaic_pool:
            # half as many again: one that is decoded again, having been out of sight at first, must not push out a needed one
            count = self.augment.mosaic_pool * 3 // 2
            self.data = replace(self.data, cache=RecentImages(self.data, count))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Key) -> Sample | UserError:
        epoch, index, strong = key
        rng = np.random.default_rng((self.seed, epoch, index, int(strong)))
        try:
            if isinstance(self.imgsz, tuple):
                size = self._random_size(self.imgsz, rng)
                sample = resized(self.data, index, size)
            elif strong and rng.random() < self.augment.mosaic:
                sample = self._mosaic(epoch, index, self.imgsz, rng)
            else:
                sample = letterboxed(self.data, index, self.imgsz, self.pad_value)
        except UserError as error:
            return error
        sample.image = color(sample.image, self.augment, rng)
        if rng.random() < self.augment.flip:
            self._flip(sample)
        keep = worth_training(sample.boxes, np.zeros(len(sample.boxes)), sample.crowd)
        sample.keep(keep)
        return sample

    def _others(self, epoch: int, index: int, rng: np.random.Generator) -> list[int]:
        """Three images to go with one: of those before it in the epoch's order, or of all."""
        n, pool = len(self.data), self.augment.mosaic_pool
        if not 0 < pool < n:
            anywhere: list[int] = rng.integers(0, n, 3).tolist()
            return anywhere
        if epoch != self._epoch:
            self._order = epoch_order(n, self.seed, epoch)
            self._place = np.empty(n, np.int64)
            self._place[self._order] = np.arange(n)
            self._epoch = epoch
        before: list[int] = self._order[self._place[index] - rng.integers(1, pool + 1, 3)].tolist()
        return before

    def _random_size(self, sides: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        """The pair with the short side that the recipe draws for an image."""
        choices = self.augment.short_sides
        if not choices:
            return sides
        short = rng.integers(choices[0], choices[1] + 1) if len(choices) == 2 else rng.choice(choices)
        return int(short), sides[1]

    def _mosaic(self, epoch: int, index: int, side: int, rng: np.random.Generator) -> Sample:
        others = self._others(epoch, index, rng)
        sample = mosaic(self.data, [index, *others], (side, side), self.augment, self.pad_value, rng)
        if len(self.with_boxes) and rng.random() < self.augment.mixup:
            other = int(rng.choice(self.with_boxes))
            sample = mixup(sample, self.data, other, self.augment, self.pad_value, rng)
        return sample

    @staticmethod
    def _flip(sample: Sample) -> None:
        """Mirror the image within its content, so that padding stays at the right and at the bottom."""
        width, height = int(sample.content[2]), int(sample.content[3])
        part, sample.boxes = flip(sample.image[:height, :width], sample.boxes, width)
        sample.image[:height, :width] = part
        if sample.masks is not None:
            sample.masks = [mask.mirrored(width) for mask in sample.masks]


@dataclass
class EvalSamples(Dataset[Sample | UserError]):
    """Samples of a split by index, resized and nothing else; `padded`: letterboxed into a square `imgsz`."""

    data: DetectionData
    imgsz: ImageSize
    pad_value: Color = GRAY
    padded: bool = True

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample | UserError:
        try:
            if self.padded and isinstance(self.imgsz, int):
                return letterboxed(self.data, index, self.imgsz, self.pad_value)
            return resized(self.data, index, self.imgsz)
        except UserError as error:
            return error


def letterboxed(data: DetectionData, index: int, side: int, pad_value: Color) -> Sample:
    """One image letterboxed into a square, with its boxes. UserError: it cannot be read."""
    image, scale, _, _ = letterbox(data.read(index), (side, side), pad_value)
    height, width = data.sizes[index].tolist()
    return _scaled_sample(data, index, image, scale, (int(height * scale), int(width * scale)))


def resized(data: DetectionData, index: int, imgsz: ImageSize) -> Sample:
    """One image at its own size for inputs of `imgsz`, not padded. UserError: it cannot be read."""
    image = data.read(index)
    scale, height, width = fit_size(image.shape[0], image.shape[1], imgsz)
    image = image.copy() if image.shape[:2] == (height, width) else np.asarray(cv2.resize(image, (width, height)))
    return _scaled_sample(data, index, image, scale, (height, width))


def _scaled_sample(
    data: DetectionData, index: int, image: np.ndarray, scale: float, content_size: tuple[int, int]
) -> Sample:
    """The sample of an image scaled and put at the top left, where it takes `content_size` (height, width) px."""
    height, width = data.sizes[index].tolist()
    boxes, labels, crowd = data.annotations(index)
    content = np.array([0, 0, content_size[1], content_size[0]], np.float32)
    meta = ImageMeta(int(data.image_ids[index]), data.paths[index], height, width, scale, index=index)
    masks = None
    if data.masks is not None:
        matrix = np.array([[scale, 0.0, 0.0], [0.0, scale, 0.0]])
        masks = placed_masks(data, index, matrix, (0.0, 0.0, float(width), float(height)))
    return Sample(image, (boxes * scale).astype(np.float32), labels, crowd, content, meta, masks)
