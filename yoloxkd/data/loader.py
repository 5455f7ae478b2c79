"""Samples, their order, and the batches a run reads. A sample is a pure function of (seed, epoch, index, strong)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from yoloxkd.config.augment import Augment
from yoloxkd.data.mosaic import mixup, mosaic
from yoloxkd.data.records import DetectionData
from yoloxkd.data.transforms import Color, Sample, Size, colour, flip, letterbox, worth_training
from yoloxkd.errors import UserError
from yoloxkd.types import Batch, ImageMeta, Targets

Key = tuple[int, int, bool]
"""(epoch, index, strong): what names a training sample."""
GREY: Color = (114, 114, 114)
# Padded rows of a batch's boxes come in multiples of this, so that few shapes occur.
_ROWS = 8


@dataclass
class TrainSamples(Dataset[Sample | UserError]):
    """Augmented samples of a split by (epoch, index, strong).

    strong   mosaic and mixup, by their probabilities; without it, and where no mosaic is drawn: letterbox, colour, flip
    imgsz    (H, W) of the network input, px
    A picture that cannot be read is given back as its UserError: raised, it would lose its sentence between processes.
    """

    data: DetectionData
    imgsz: Size
    augment: Augment
    seed: int
    pad_value: Color = GREY

    def __post_init__(self) -> None:
        counts = np.bincount(np.repeat(np.arange(len(self.data)), np.diff(self.data.offsets)), ~self.data.crowd)
        self.with_boxes = np.flatnonzero(counts)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Key) -> Sample | UserError:
        epoch, index, strong = key
        rng = np.random.default_rng((self.seed, epoch, index, int(strong)))
        try:
            if strong and rng.random() < self.augment.mosaic:
                sample = self._mosaic(index, rng)
            else:
                sample = plain(self.data, index, self.imgsz, self.pad_value)
        except UserError as error:
            return error
        sample.image = colour(sample.image, self.augment, rng)
        if rng.random() < self.augment.flip:
            self._flip(sample)
        keep = worth_training(sample.boxes, np.zeros(len(sample.boxes)))
        sample.boxes, sample.labels, sample.crowd = sample.boxes[keep], sample.labels[keep], sample.crowd[keep]
        return sample

    def _mosaic(self, index: int, rng: np.random.Generator) -> Sample:
        others = rng.integers(0, len(self.data), 3).tolist()
        sample = mosaic(self.data, [index, *others], self.imgsz, self.augment, self.pad_value, rng)
        if len(self.with_boxes) and rng.random() < self.augment.mixup:
            other = int(rng.choice(self.with_boxes))
            sample = mixup(sample, self.data, other, self.augment, self.pad_value, rng)
        return sample

    @staticmethod
    def _flip(sample: Sample) -> None:
        """Mirror the picture within its content, so that padding stays at the right and at the bottom."""
        width, height = int(sample.content[2]), int(sample.content[3])
        part, sample.boxes = flip(sample.image[:height, :width], sample.boxes, width)
        sample.image[:height, :width] = part


@dataclass
class EvalSamples(Dataset[Sample | UserError]):
    """Letterboxed samples of a split by index, nothing else done to them; imgsz is (H, W) px."""

    data: DetectionData
    imgsz: Size
    pad_value: Color = GREY

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample | UserError:
        try:
            return plain(self.data, index, self.imgsz, self.pad_value)
        except UserError as error:
            return error


def plain(data: DetectionData, index: int, imgsz: Size, pad_value: Color) -> Sample:
    """One letterboxed picture with its boxes. UserError: it cannot be read."""
    height, width = data.sizes[index].tolist()
    image, scale, left, top = letterbox(data.read(index), imgsz, pad_value)
    boxes, labels, crowd = data.annotations(index)
    content = np.array([left, top, left + int(width * scale), top + int(height * scale)], np.float32)
    moved = (boxes * scale + (left, top, left, top)).astype(np.float32)
    meta = ImageMeta(int(data.image_ids[index]), data.paths[index], height, width, scale, left, top)
    return Sample(image, moved, labels, crowd, content, meta)


class EpochSampler(Sampler[list[Key]]):
    """Batches of sample keys for one epoch and one process; the order is a function of (seed, epoch) alone.

    n      images of the split
    batch  images a batch, of this process
    An epoch has n // (batch * world) batches; images left over wait for another epoch. With fewer images than one batch
    needs, an epoch is one batch of those there are, the same number in every process.
    """

    def __init__(self, n: int, batch: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.n, self.seed, self.rank, self.world = n, seed, rank, world
        self.batch = min(batch, max(1, n // world))
        self.set_epoch(0)

    def set_epoch(self, epoch: int, strong: bool = True, start_batch: int = 0) -> None:
        """Choose what the next iteration gives; `start_batch` skips batches, for a run resumed within an epoch."""
        self.epoch, self.strong, self.start_batch = epoch, strong, start_batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return max(1, self.n // (self.batch * self.world))

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n)
        step = self.batch * self.world
        for number in range(self.start_batch, len(self)):
            places = np.arange(number * step + self.rank, (number + 1) * step, self.world) % self.n
            yield [(self.epoch, index, self.strong) for index in order[places].tolist()]


def collate(samples: Sequence[Sample | UserError]) -> Batch | UserError:
    """Samples of one size -> a Batch with padded targets; or the first error among them."""
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        good.append(sample)
    height, width = good[0].image.shape[:2]
    most = max(len(sample.boxes) for sample in good)
    rows = max(_ROWS, -(-most // _ROWS) * _ROWS)
    images = np.empty((len(good), 3, height, width), np.uint8)
    boxes = np.zeros((len(good), rows, 4), np.float32)
    labels = np.zeros((len(good), rows), np.int64)
    mask, ignore = np.zeros((len(good), rows), bool), np.zeros((len(good), rows), bool)
    for b, sample in enumerate(good):
        n = len(sample.boxes)
        for channel in range(3):
            cv2.extractChannel(sample.image, channel, images[b, channel])
        boxes[b, :n], labels[b, :n] = sample.boxes, sample.labels
        mask[b, :n], ignore[b, :n] = ~sample.crowd, sample.crowd
    as_tensor = torch.from_numpy
    targets = Targets(as_tensor(boxes), as_tensor(labels), as_tensor(mask), as_tensor(ignore))
    content = as_tensor(np.stack([sample.content for sample in good]))
    return Batch(as_tensor(images), targets, content, [sample.meta for sample in good])


def dead_worker(error: BaseException) -> str | None:
    """The sentence for a loader process that died, or None for any other error.

    torch notices such a death by a signal, so its error may come up anywhere in the program, not only while waiting for
    a batch.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader worker"):
        return None
    if "Bus error" in text:
        return (
            "a loader process ran out of shared memory; lower --workers or --batch, or give the system more of it "
            "(for Docker: --shm-size)"
        )
    signal = re.search(r"killed by signal: (\w+)", text)
    how = f"was killed ({signal[1]})" if signal else "died"
    return f"a loader process {how}, mostly for want of memory; lower --workers, --batch or --imgsz"


class Loader(DataLoader[Any]):
    """A DataLoader of batches; what happens to a worker (a picture it cannot read, its death) is raised as a UserError."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            for batch in super().__iter__():
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if (reason := dead_worker(error)) is None:
                raise
            raise UserError(reason) from error

    def set_epoch(self, epoch: int, strong: bool = True, start_batch: int = 0) -> None:
        """Passed to the EpochSampler of a training loader."""
        sampler = self.batch_sampler
        if not isinstance(sampler, EpochSampler):
            raise TypeError("only a training loader has epochs")
        sampler.set_epoch(epoch, strong, start_batch)


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # parallel by processes already


def _loader(samples: Dataset[Any], batches: Any, workers: int, pin_memory: bool, keep_workers: bool) -> Loader:
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
    imgsz: int | Size,
    batch: int,
    augment: Augment,
    seed: int,
    workers: int = 0,
    pad_value: Color = GREY,
    pin_memory: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Shuffled, augmented batches; `batch` is per process. Call `set_epoch` before each epoch.

    The batches do not depend on `workers`. UserError: the split has no image, or (while reading) a picture is broken.
    """
    if not len(data):
        raise UserError(f"the split '{data.split}' has no image to train on")
    samples = TrainSamples(data, _size(imgsz), augment, seed, pad_value)
    return _loader(samples, EpochSampler(len(data), batch, seed, rank, world), workers, pin_memory, True)


def eval_loader(
    data: DetectionData,
    *,
    imgsz: int | Size,
    batch: int,
    workers: int = 0,
    pad_value: Color = GREY,
    pin_memory: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Letterboxed batches of every image once, in order (every `world`-th one from `rank`); the last may be smaller.

    UserError (while reading): a picture is broken.
    """
    mine = list(range(rank, len(data), world))
    batches = [mine[i : i + batch] for i in range(0, len(mine), batch)]
    return _loader(EvalSamples(data, _size(imgsz), pad_value), batches, workers, pin_memory, False)


def _size(imgsz: int | Size) -> Size:
    return (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
