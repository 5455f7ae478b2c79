"""Interface of an annotation format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.problems import Faults


@dataclass(frozen=True, slots=True)
class SplitSource:
    """Where a split's files are. Which of them a format reads is its own matter.

    root         folder of the data set
    images       folders, or list files
    annotations  files or folders
    lists        files that name the images of the split
    key_points   [how many, 2 or 3 numbers each] that follow the box on a line; None: nothing is said of any
    masks        whether instance masks are wanted, where the format has them
    """

    root: Path
    images: tuple[Path, ...] = ()
    annotations: tuple[Path, ...] = ()
    lists: tuple[Path, ...] = ()
    key_points: tuple[int, int] | None = None
    masks: bool = False


@dataclass(frozen=True, slots=True)
class Format:
    """One annotation format.

    read      (files, class names, split name, faults) -> the split; see the reader for its errors
    required  keys of a split in the data YAML: images, annotations, labels, list
    optional  further keys that it reads
    several   keys that may name more than one file or folder
    names     class names of a data YAML that gives none

    write         (the split, its images' names, folder of the data set) -> the split's entry in a data YAML; None: it is read alone
    image_folder  folder of a split's images
    one_folder    whether all splits share that folder
    keeps         what it can hold beside boxes and classes: regions and difficult (to be ignored), areas, unclipped,
                  visible, heads, masks, names, numbers
    most_classes  how many classes it can hold
    says_sizes    whether annotations give their image's size
    """

    read: Callable[[SplitSource, list[str], str, Faults], DetectionData]
    write: Callable[[DetectionData, Sequence[str], Path], Any] | None
    required: tuple[str, ...] = ("images", "annotations")
    optional: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    image_folder: str = "images/{split}"
    one_folder: bool = False
    keeps: frozenset[str] = frozenset()
    most_classes: int = 10**6
    says_sizes: bool = True
