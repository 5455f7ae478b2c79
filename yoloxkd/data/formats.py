"""What an annotation format is to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from yoloxkd.data.faults import Faults
from yoloxkd.data.records import DetectionData


@dataclass(frozen=True, slots=True)
class SplitSource:
    """Where a split's files are. Which of them a format reads is its own matter.

    root         folder of the data set
    images       folders, or list files
    annotations  files or folders
    lists        files that name the images of the split
    """

    root: Path
    images: tuple[Path, ...] = ()
    annotations: tuple[Path, ...] = ()
    lists: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Format:
    """One annotation format.

    read      (files, class names, split name, faults) -> the split; see the reader for its errors
    required  keys of a split in the data YAML: images, annotations, labels, list
    optional  further keys that it reads
    several   keys that may name more than one file or folder
    names     class names of a data YAML that gives none
    """

    read: Callable[[SplitSource, list[str], str, Faults], DetectionData]
    required: tuple[str, ...] = ("images", "annotations")
    optional: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
