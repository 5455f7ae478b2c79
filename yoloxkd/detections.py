"""Detections of one image: a value that can be indexed, iterated, joined, drawn and saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from yoloxkd.errors import UserError
from yoloxkd.instance_masks import rle_dict
from yoloxkd.soft_masks import SoftMasks

if TYPE_CHECKING:
    from yoloxkd.types import ImageMeta

Rows = int | slice | Sequence[int] | Sequence[bool] | np.ndarray


class Detection(NamedTuple):
    """One object: box (4,) float32 xyxy px, score 0 to 1, label, its name, mask (H, W) bool or None."""

    box: np.ndarray
    score: float
    label: int
    name: str
    mask: np.ndarray | None = None


@dataclass(slots=True)
class Detections:
    """Detections of one image, best score first.

    Attributes:
        boxes: (n, 4) float32 xyxy, px of the original image.
        scores: (n,) float32, 0 to 1.
        labels: (n,) int64, index into names.
        names: class names.
        masks: (n, H, W) bool, the pixels of each object in the original image; None: the model gives no masks.
        soft_masks: masks in the network's own raster, as long as boxes are in px of its input; `to_image` makes
            `masks` of them.
        image: reads the image that was detected on, (H, W, 3) uint8 RGB; None: it is not known. Equality leaves it out.

    Example:
        >>> found = Detections(np.array([[0, 0, 9, 9], [2, 2, 5, 5]]), np.array([0.9, 0.4]), np.array([1, 0]), ["cat", "dog"])
        >>> len(found[found.scores > 0.5])
        1
        >>> [one.name for one in found]
        ['dog', 'cat']
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str] = field(default_factory=list)
    masks: np.ndarray | None = None
    soft_masks: SoftMasks | None = None
    image: Callable[[], np.ndarray] | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: Rows) -> Detections:
        """Some of the detections: a number, a slice, numbers, or a mask (n,) of bool. IndexError: no such row."""
        if isinstance(rows, int | np.integer):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"detection {rows} of {len(self)}")
            rows = [int(rows)]
        elif not isinstance(rows, slice | np.ndarray):
            rows = np.asarray(rows, bool if len(rows) and isinstance(rows[0], bool | np.bool_) else np.int64)
        masks = None if self.masks is None else self.masks[rows]
        soft = None if self.soft_masks is None else self.soft_masks[rows]
        return Detections(self.boxes[rows], self.scores[rows], self.labels[rows], self.names, masks, soft, self.image)

    def __iter__(self) -> Iterator[Detection]:
        """Each object with its values, best first."""
        for i, (box, score, label) in enumerate(zip(self.boxes, self.scores, self.labels, strict=True)):
            mask = None if self.masks is None else self.masks[i]
            yield Detection(box, float(score), int(label), self._name(int(label)), mask)

    def _name(self, label: int) -> str:
        return self.names[label] if self.names else str(label)

    @classmethod
    def concat(cls, parts: Sequence[Detections]) -> Detections:
        """The detections of several calls on one image (tiles, models), best score first.

        Raises:
            UserError: their class names differ, or only some have masks.
        """
        if not parts:
            return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
        if any(part.names != parts[0].names for part in parts):
            raise UserError("detections of different class names cannot be joined: their labels mean different things")
        masks = [part.masks for part in parts if part.masks is not None]
        if len(masks) not in (0, len(parts)):
            raise UserError("detections with masks and without cannot be joined")
        scores = np.concatenate([part.scores for part in parts])
        joined = cls(
            np.concatenate([part.boxes for part in parts]),
            scores,
            np.concatenate([part.labels for part in parts]),
            parts[0].names,
            np.concatenate(masks) if masks else None,
            image=parts[0].image if all(part.image for part in parts) else None,  # a tile's image is not the whole one
        )
        return joined[np.argsort(-scores, kind="stable")]

    def moved(self, scale: float = 1.0, left: float = 0.0, top: float = 0.0) -> Detections:
        """Boxes times `scale`, then shifted by (left, top) px, without `soft_masks` and `image`. UserError: there are `masks`."""
        if self.masks is not None:
            raise UserError("detections with masks cannot be moved to another image size")
        shift = np.array([left, top, left, top], dtype=np.float32)
        return Detections(self.boxes * np.float32(scale) + shift, self.scores, self.labels, self.names)

    def to_image(self, meta: ImageMeta) -> Detections:
        """From px of the network input to px of the stored image, clipped to it; `soft_masks` become `masks`."""
        offset = np.array([meta.left, meta.top, meta.left, meta.top], dtype=np.float32)
        boxes = (self.boxes - offset) / np.float32(meta.scale)
        limit = np.array([meta.width, meta.height, meta.width, meta.height], dtype=np.float32)
        masks = self.masks
        if self.soft_masks is not None:
            boxes, masks = self.soft_masks.in_image(boxes, meta)
        return Detections(np.clip(boxes, 0, limit), self.scores, self.labels, self.names, masks)

    def as_dicts(self) -> list[dict[str, Any]]:
        """JSON-ready rows: box, score, label, name; with masks also mask, as COCO's compressed run lengths and their size."""
        return [
            {
                "box": [round(float(v), 3) for v in one.box],
                "score": round(one.score, 6),
                "label": one.label,
                "name": one.name,
            }
            | ({} if one.mask is None else {"mask": rle_dict(one.mask)})
            for one in self
        ]

    def plot(self, image: np.ndarray | None = None) -> np.ndarray:
        """Draw every box (and mask) with its class name and its score in percent; better ones over worse ones.

        Args:
            image: (H, W, 3) uint8 RGB to draw on. None: the image that was detected on, which `Detector.predict` notes.

        Returns:
            A drawn copy.

        Raises:
            UserError: the image is of another kind, not as large as the masks, or not known.
        """
        from yoloxkd.drawing import draw_boxes, draw_masks, shortened

        if image is None:
            if self.image is None:
                raise UserError(
                    "plot draws on a uint8 RGB array of shape (h, w, 3); these detections do not know their image: plot(image)"
                )
            image = self.image()

        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise UserError(f"plot draws on a uint8 RGB array of shape (h, w, 3), got {kind}")
        if self.masks is not None:
            if self.masks.shape[1:] != image.shape[:2]:
                raise UserError(f"the masks are {self.masks.shape[1:]} and the image {image.shape[:2]} (height, width)")
            image = draw_masks(image, self.masks, self.labels)
        captions = [f"{shortened(one.name)} {100 * one.score:.0f}" for one in self]
        return draw_boxes(image, self.boxes, self.labels, captions)

    def save(self, path: str | Path, image: np.ndarray | None = None) -> Path:
        """Write the rows of `as_dicts` (.json), or the drawn image (.jpg, .png and others that OpenCV writes).

        Args:
            path: the file; its folder is made.
            image: as of `plot`.

        Raises:
            UserError: an image to draw on is not known, an unknown suffix, or a file that cannot be written.
        """
        from yoloxkd.write_image import write_image

        if not isinstance(path, str | Path) or not str(path):
            raise UserError(f"save needs the name of a file, got {path!r}")
        file = Path(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix.lower() == ".json":
                file.write_text(json.dumps(self.as_dicts(), indent=1) + "\n", encoding="utf-8")
            elif image is None and self.image is None:
                raise UserError(f"{file}: give .json for the rows, or the image to draw on: save(path, image)")
            else:
                write_image(file, self.plot(image))
        except OSError as error:
            raise UserError(f"could not write {file}: {error.strerror or error}") from error
        return file

    @classmethod
    def from_supervision(cls, detections: Any, names: Sequence[str] = ()) -> Detections:
        """A `supervision.Detections`, with its masks, best score first.

        Args:
            detections: with `class_id` and `confidence`.
            names: class names by class_id.

        Raises:
            UserError: it lacks `class_id` or `confidence`.
        """
        for key in ("class_id", "confidence"):
            if getattr(detections, key, None) is None:
                raise UserError(f"detections of supervision without '{key}' cannot be taken: every object needs one")
        masks = None if detections.mask is None else np.asarray(detections.mask, bool)
        labels = np.asarray(detections.class_id, np.int64)
        boxes = np.asarray(detections.xyxy, np.float32).reshape(-1, 4)
        scores = np.asarray(detections.confidence, np.float32)
        return cls.concat([cls(boxes, scores, labels, list(names), masks)])

    def to_supervision(self) -> Any:
        """The same as a `supervision.Detections`, class names in its data. UserError: that package is not installed."""
        try:
            import supervision
        except ImportError as error:
            raise UserError("to_supervision needs the package supervision: pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32).reshape(-1, 4),
            mask=self.masks,
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(int),
            data={"class_name": np.array([one.name for one in self], dtype=str)},
        )
