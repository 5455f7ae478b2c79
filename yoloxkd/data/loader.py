"""Batches of a run: data loaders for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from yoloxkd.config.augment import Augment
from yoloxkd.data.augment.transforms import Color, Sample, up_to_multiple
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.sampler import EpochSampler
from yoloxkd.data.samples import GRAY, EvalSamples, TrainSamples
from yoloxkd.data.worker_death import dead_worker, main_guard, refuse_while_starting
from yoloxkd.errors import UserError
from yoloxkd.types import Batch, ImageSize, Targets

# Padded rows of a batch's boxes come in multiples of this, so that few shapes occur.
_ROWS = 8


@dataclass(frozen=True)
class Collate:
    """Samples -> a Batch with padded targets; or the first error among them.

    The batch is as large as its largest sample, up to a multiple of `multiple` px; smaller ones lie at the top left,
    the rest is `pad_value`. With `mask_padding` the targets say where the image ends, so that padding is not trained
    as background.
    With `masks` the targets have the masks of the boxes, painted here; an object without one has none of its pixels.
    """

    multiple: int = 1
    pad_value: Color = GRAY
    mask_padding: bool = False
    masks: bool = False

    def __call__(self, samples: Sequence[Sample | UserError]) -> Batch | UserError:
        good: list[Sample] = []
        for sample in samples:
            if isinstance(sample, UserError):
                return sample
            good.append(sample)
        most = max(len(sample.boxes) for sample in good)
        rows = max(_ROWS, up_to_multiple(most, _ROWS))
        boxes = np.zeros((len(good), rows, 4), np.float32)
        labels = np.zeros((len(good), rows), np.int64)
        mask, ignore = np.zeros((len(good), rows), bool), np.zeros((len(good), rows), bool)
        for b, sample in enumerate(good):
            n = len(sample.boxes)
            boxes[b, :n], labels[b, :n] = sample.boxes, sample.labels
            mask[b, :n], ignore[b, :n] = ~sample.crowd, sample.crowd
        as_tensor = torch.from_numpy
        content = as_tensor(np.stack([sample.content for sample in good]))
        targets = Targets(
            as_tensor(boxes),
            as_tensor(labels),
            as_tensor(mask),
            as_tensor(ignore),
            content if self.mask_padding else None,
        )
        # as it lies in memory the batch is channels_last, which the networks run in
        images = as_tensor(self._images(good)).permute(0, 3, 1, 2)
        if self.masks:
            targets.masks = as_tensor(self._masks(good, rows, (images.shape[2], images.shape[3])))
        return Batch(images, targets, content, [sample.meta for sample in good])

    @staticmethod
    def _masks(samples: Sequence[Sample], rows: int, size: tuple[int, int]) -> np.ndarray:
        """(B, rows, H, W) bool"""
        out = np.zeros((len(samples), rows, *size), bool)
        for sample, of_image in zip(samples, out, strict=True):
            for mask, painted in zip(sample.masks or (), of_image, strict=False):
                mask.paint(painted)
        return out

    def _images(self, samples: Sequence[Sample]) -> np.ndarray:
        """(B, H, W, 3) uint8"""
        height, width = (up_to_multiple(max(s.image.shape[axis] for s in samples), self.multiple) for axis in (0, 1))
        images = np.empty((len(samples), height, width, 3), np.uint8)
        for sample, image in zip(samples, images, strict=True):
            h, w = sample.image.shape[:2]
            image[:h, :w] = sample.image
            image[h:], image[:h, w:] = self.pad_value, self.pad_value
        return images


class Loader(DataLoader[Any]):
    """A DataLoader of batches; what happens to a worker (an image it cannot read, its death) is raised as a UserError."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = self._batches()
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except UserError:
            raise
        except Exception as error:
            if (reason := dead_worker(*_death(error, getattr(batches, "_workers", ())))) is None:
                raise
            raise UserError(reason) from error

    def _batches(self) -> Iterator[Any]:
        """The batches, once the workers run. Processes that are not forked may fail to."""
        if not self.num_workers:
            return super().__iter__()
        refuse_while_starting()
        try:
            return super().__iter__()
        except (ConnectionError, EOFError) as error:  # the pipe to a process that has ended already
            raise UserError(main_guard()) from error

    def set_epoch(self, epoch: int, strong: bool = True, start_batch: int = 0) -> None:
        """Passed to the EpochSampler of a training loader."""
        sampler = self.batch_sampler
        if not isinstance(sampler, EpochSampler):
            raise TypeError("only a training loader has epochs")
        sampler.set_epoch(epoch, strong, start_batch)


def _death(error: Exception, workers: Sequence[Any]) -> tuple[Exception, list[int | None]]:
    """The error that tells of a worker's death, and the exit codes of all of them.

    A worker that dies while it hands over a batch is first noticed as a broken connection; torch's own word, which it
    gives by a signal, may come up while its exit code is waited for.
    """
    connection_lost = isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) and not str(error).startswith(
        "Caught "
    )
    try:
        if connection_lost:
            ended = wait([worker.sentinel for worker in workers], timeout=5)
            for worker in workers:
                if worker.sentinel in ended:  # a process closes its end a moment before its exit code can be read
                    worker.join()
        codes = [worker.exitcode for worker in workers]
    except RuntimeError as death:
        return death, []
    return (RuntimeError("DataLoader worker exited unexpectedly") if connection_lost and any(codes) else error), codes


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # parallel by processes already


def _loader(
    samples: Dataset[Any], batches: Any, collate: Collate, workers: int, pin_memory: bool, keep_workers: bool
) -> Loader:
    return Loader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        persistent_workers=keep_workers and workers > 0,
        generator=torch.Generator(),  # its own, so that reading data leaves the run's random state alone
    )


def train_loader(
    data: DetectionData,
    *,
    imgsz: ImageSize,
    batch: int,
    augment: Augment,
    seed: int,
    multiple: int = 32,
    workers: int = 0,
    pad_value: Color = GRAY,
    pin_memory: bool = False,
    rank: int = 0,
    world: int = 1,
    masks: bool = False,
) -> Loader:
    """Shuffled, augmented batches; `batch` is per process. Call `set_epoch` before each epoch.

    Batches of a pair of sides hold images in landscape or in portrait, their height and width are multiples of
    `multiple`, and their targets say where each image ends. The batches do not depend on `workers`.
    With `masks` the targets have the masks of `data`.
    UserError: the split has no image, or (while reading) an image is broken.
    """
    if not len(data):
        raise UserError(f"the split '{data.split}' has no image to train on")
    samples = TrainSamples(data, imgsz, augment, seed, pad_value)
    if isinstance(imgsz, int):
        portrait, collate = None, Collate(pad_value=pad_value, masks=masks)
    else:
        portrait, collate = data.sizes[:, 0] > data.sizes[:, 1], Collate(multiple, pad_value, True, masks)
    order = EpochSampler(len(data), batch, seed, rank, world, portrait)
    return _loader(samples, order, collate, workers, pin_memory, True)


def eval_loader(
    data: DetectionData,
    *,
    imgsz: ImageSize,
    batch: int,
    rect: bool = False,
    multiple: int = 32,
    workers: int = 0,
    pad_value: Color = GRAY,
    pin_memory: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Batches of every image once (every `world`-th one from `rank`), letterboxed and in order; the last may be smaller.

    With a pair of sides, or with `rect`, images come sorted by aspect ratio and a batch is no larger than its images
    need, up to a multiple of `multiple` px. UserError (while reading): an image is broken.
    """
    rect = rect or isinstance(imgsz, tuple)
    mine = np.arange(rank, len(data), world)
    if rect:
        height, width = data.sizes[mine].T
        mine = mine[np.argsort(height / width, kind="stable")]
    batches = [part.tolist() for part in np.split(mine, range(batch, len(mine), batch)) if len(part)]
    samples = EvalSamples(data, imgsz, pad_value, padded=not rect)
    collate = Collate(multiple if rect else 1, pad_value)
    return _loader(samples, batches, collate, workers, pin_memory, False)
