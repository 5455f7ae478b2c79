"""Exported files as predictors, on ONNX Runtime or another runtime."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from yoloxkd.errors import UserError, nearest_file
from yoloxkd.exporters import RUNTIMES, RUNTIMES_OF
from yoloxkd.exporters.metadata import FileMetadata, read_metadata
from yoloxkd.file_kinds import exported_format
from yoloxkd.soft_masks import BoxMasks
from yoloxkd.types import Detections

if TYPE_CHECKING:
    from torch import Tensor


class Session(Protocol):
    """A loaded file in some runtime.

    metadata  of the file, as texts
    outputs   names, in the file's order
    """

    metadata: dict[str, str]
    outputs: list[str]

    def run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        """images (N, 3, H, W) float32 -> the outputs."""
        ...


LEVELS = "levels"
"""Beside the outputs of a file without suppression: how many locations each feature level has, where its rule needs them."""
SIZE = "size"
"""Beside the outputs of a raw file: height and width of the input."""
WITH_NMS, WITHOUT_NMS = ("boxes", "scores", "labels", "counts"), ("boxes", "scores")
"""Outputs of a file with suppression in the graph, and of one without."""
MASKS = "masks"
"""A further output of the former, of a detector of masks."""


class OnnxPredictor:
    """A `types.Predictor` around a file that this package exported, with suppression in the graph or without.

    runtime              a key of RUNTIMES; None: the usual one of the file's format
    conf, iou, max_det   None: as in the file's metadata. Where suppression is in the graph its settings are fixed: a
                         higher conf or a smaller max_det filters its output, anything else is a UserError
    threads              of the runtime; None: its own choice
    imgsz                px, side of the input the file was exported for
    dynamic_batch, dynamic_size   whether it takes any batch, any height and width (multiples of `stride`)
    metadata             all of it, as texts

    UserError: not an ONNX file, or one without the metadata of ours (it says which is missing).
    """

    def __init__(
        self,
        path: str | Path,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        threads: int | None = None,
        runtime: str | None = None,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"there is no file {path}{nearest_file(path)}")
        runtime = runtime or RUNTIMES_OF[exported_format(self.path) or "onnx"][0]
        self.session = RUNTIMES[runtime](self.path, threads)
        self.metadata: dict[str, str] = dict(self.session.metadata)
        self._file_metadata = file_metadata = read_metadata(self.metadata, self.path)
        self.names: list[str] = file_metadata.names
        self.stride = file_metadata.size_multiple
        red, green, blue = file_metadata.pad_value
        self.pad_value: tuple[int, int, int] = (red, green, blue)
        self.imgsz = file_metadata.input_size[0]
        self.dynamic_batch = self.dynamic_size = file_metadata.dynamic
        self.nms = file_metadata.nms
        self.masks: bool = file_metadata.nms and file_metadata.masks
        self._check_outputs()
        self._set(conf, iou, max_det)

    def _set(self, conf: float | None, iou: float | None, max_det: int | None) -> None:
        file_metadata = self._file_metadata
        self.conf = float(file_metadata.conf if conf is None else conf)
        self.iou = float(file_metadata.iou if iou is None else iou)
        self.max_det = int(file_metadata.max_det if max_det is None else max_det)
        if self.nms:
            self._check_baked(file_metadata)

    def _check_outputs(self) -> None:
        if self._file_metadata.head_maps is not None:
            missing = set(self._file_metadata.head_maps.tensors()) - set(self.session.outputs)
            if missing or self.nms:
                raise UserError(
                    f"{self.path} has the outputs {', '.join(self.session.outputs)}, and its metadata promises the raw "
                    f"outputs {', '.join(self._file_metadata.head_maps.tensors())}; export the checkpoint again"
                )
            return
        promised = (
            (*WITH_NMS, MASKS) if self.nms and self._file_metadata.masks else WITH_NMS if self.nms else WITHOUT_NMS
        )
        outputs = [name for name in self.session.outputs if name in (*WITH_NMS, MASKS)]
        if set(outputs) != set(promised):  # boxes and scores have other shapes with and without suppression
            raise UserError(
                f"{self.path} has the outputs {', '.join(outputs) or 'of another model'}, and its metadata "
                f"(nms {str(self.nms).lower()}) promises {', '.join(promised)}; export the checkpoint again"
            )

    def tuned(self, conf: float | None = None, iou: float | None = None, max_det: int | None = None) -> OnnxPredictor:
        """The same loaded file with other settings; loading it again would cost more than a prediction."""
        other = copy.copy(self)
        other._set(conf, iou, max_det)
        return other

    def __call__(self, images: Tensor) -> list[Detections]:
        """images (B, 3, H, W) uint8 RGB -> one Detections per image, boxes in px of the network input."""
        pixels = self.prepare(images)
        self._check_size(pixels.shape[2], pixels.shape[3])
        step = max(len(pixels), 1) if self.dynamic_batch else 1
        results: list[Detections] = []
        for at in range(0, len(pixels), step):
            results += self.detections(self.run(pixels[at : at + step]))
        return results

    def prepare(self, images: Tensor) -> np.ndarray:
        """The images as the graph wants them: (N, 3, H, W) float32."""
        return np.ascontiguousarray(images.cpu().numpy(), np.float32)

    def run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """The graph itself: pixels (N, 3, H, W) of any dtype, RGB 0..255 -> its outputs by name, `LEVELS` and `SIZE`."""
        results = self.session.run(np.ascontiguousarray(pixels, np.float32))
        outputs = dict(zip(self.session.outputs, results, strict=True))
        height, width = pixels.shape[2:]
        head = self._file_metadata.head_maps
        if head is not None:
            outputs[SIZE] = np.array([height, width])
        if not self.nms and self._file_metadata.pairs_per_level is not None:
            locations = outputs["scores"].shape[1] if head is None else head.count(outputs)
            outputs[LEVELS] = np.array(self._file_metadata.level_sizes(height, width, locations, self.path))
        return outputs

    def locations(self, outputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (N, A, 4) px and scores (N, A, K) of what `run` gave, of a file without NMS."""
        head = self._file_metadata.head_maps
        if head is None:
            return outputs["boxes"], outputs["scores"]
        height, width = outputs[SIZE].tolist()
        return head.locations(outputs, (height, width), len(self.names), self.path)

    def detections(self, outputs: dict[str, np.ndarray]) -> list[Detections]:
        """What `run` gave, as one Detections per image."""
        if self.nms:
            rows = zip(*(outputs[name] for name in WITH_NMS), strict=True)
            detections = [self._rows(boxes, scores, labels, int(count)) for boxes, scores, labels, count in rows]
            for one, masks in zip(detections, outputs.get(MASKS, ()), strict=MASKS in outputs):
                one.soft_masks = BoxMasks(masks[: len(one)])
            return detections
        import torch

        from yoloxkd.ops.nms import postprocess

        boxes, scores = (torch.from_numpy(x) for x in self.locations(outputs))
        levels = outputs[LEVELS].tolist() if LEVELS in outputs else ()
        of_images = postprocess(
            boxes,
            scores,
            conf=self.conf,
            iou=self.iou,
            max_det=self.max_det,
            levels=levels,
            pairs_per_level=self._file_metadata.pairs_per_level,
        )
        return [Detections(b.numpy(), s.numpy(), k.numpy(), self.names) for b, s, k in of_images]

    def _rows(self, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, count: int) -> Detections:
        """The real rows of one image. They are best first, so a higher threshold is a shorter list."""
        n = min(int((scores[:count] >= self.conf).sum()), self.max_det)
        return Detections(boxes[:n], scores[:n], labels[:n], self.names)

    def _check_baked(self, file_metadata: FileMetadata) -> None:
        """Refuse settings that the suppression inside the graph cannot give."""
        if self.conf < file_metadata.conf:
            fault, option = (
                f"finds nothing below a score of {file_metadata.conf}, but conf {self.conf} was asked for",
                "conf",
            )
        elif self.iou != file_metadata.iou:
            fault, option = f"suppresses at an IoU of {file_metadata.iou}, but iou {self.iou} was asked for", "iou"
        elif self.max_det > file_metadata.max_det:
            fault = f"gives at most {file_metadata.max_det} detections an image, but {self.max_det} were asked for"
            option = "max_det"
        else:
            return
        raise UserError(
            f"{self.path} has its NMS inside: it {fault}; export it again with that {option} or with --no-nms"
        )

    def _check_size(self, height: int, width: int) -> None:
        if self.dynamic_size:
            if height % self.stride or width % self.stride:
                raise UserError(f"{self.path} takes sizes that are multiples of {self.stride}, not {height}x{width}")
        elif (height, width) != (self.imgsz, self.imgsz):
            raise UserError(
                f"{self.path} was exported for {self.imgsz}x{self.imgsz}, not {height}x{width}; "
                f"export it again with that --imgsz or with --dynamic"
            )
