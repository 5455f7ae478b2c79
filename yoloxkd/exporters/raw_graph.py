"""Export graph of raw head outputs: pixels in, each level's class, quality and box tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from yoloxkd.errors import UserError
from yoloxkd.exporters.base import Exportable
from yoloxkd.exporters.coded_form import coded_form
from yoloxkd.exporters.edge_form import edge_form
from yoloxkd.exporters.head_maps import HeadLevel, HeadMaps
from yoloxkd.exporters.layer_steps import LayerSteps, rounded_form
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.nn.detector import Detector
from yoloxkd.ops.boxes import LARGEST_LOG
from yoloxkd.types import Tap

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from yoloxkd.exporters.onnx import ExportOptions

PLAIN = ("cells", "distances", "distributions", "anchors")
"""Box codes that `HeadMaps` decodes."""


class RawHead(nn.Module):
    """An Exportable that ends with its predictors.

    forward: images (N, 3, H, W) -> the tensors that `describe_head` names, in its order.
    """

    def __init__(self, network: Exportable) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        detector = cast(DenseDetector, self.network.detector)
        _, features = detector.pyramid(detector.normalize(images))
        head_out = detector.predict(detector.tower(Tap.CLS, features), detector.tower(Tap.REG, features))
        of_levels = zip(
            *(part for part in (head_out.classes, head_out.quality, head_out.boxes) if part is not None), strict=True
        )
        return tuple(tensor for level in of_levels for tensor in level)


def exported_program(
    detector: Detector[Any, Any], options: ExportOptions, steps: Mapping[str, LayerSteps] | None = None
) -> ExportedProgram:
    """The edge form of a detector as an exported program, of raw tensors or of boxes and scores.

    steps  of the layers that are int8
    One trained for int8 comes with its rounded weights, and without its rounded activations where `steps` has none.
    """
    network = Exportable(detector)
    rounded_form(network.detector)
    edge_form(network.detector)
    coded_form(network.detector, steps or {})
    module: nn.Module = RawHead(network) if options.raw else network
    sample = torch.full((1, 3, options.imgsz, options.imgsz), 114.0)
    with torch.no_grad():  # decomposed, so that nothing is done in place
        program: ExportedProgram = torch.export.export(module.eval(), (sample,)).run_decompositions({})
    return program


def describe_head(detector: Detector[Any, Any]) -> HeadMaps:
    """The tensors of a detector's raw file. UserError: its boxes are not decoded cell by cell."""
    code = detector.spec.box_code
    if not isinstance(detector, DenseDetector) or code.kind not in PLAIN:
        raise UserError(
            f"a {detector.family} has no class and box tensors that are decoded cell by cell, and cannot be exported with "
            "raw outputs; leave --outputs raw out"
        )
    side = 2 * detector.size_multiple
    cells = tuple((-(-side // stride),) * 2 for stride in detector.spec.strides)
    grid = detector.grid(cells, (side, side), torch.device("cpu"))
    anchors = detector.anchors(grid)
    quality = detector.spec.quality
    names = {None: None, "objectness": "objectness", "localization": "quality"}
    levels = []
    for part, stride in zip(grid.slices(), grid.strides, strict=True):
        around: list[list[float]] = []
        if anchors is not None and code.kind == "anchors":
            first = slice(part.start, part.start + grid.per_cell)
            around = (anchors[first] - grid.points[first].repeat(1, 2)).tolist()
        levels.append(
            HeadLevel(
                stride=stride,
                classes=f"classes_{stride}",
                quality=None if quality is None else f"{names[quality]}_{stride}",
                boxes=f"boxes_{stride}",
                unit=stride if detector.code_in_strides else 1,
                anchors=around,
            )
        )
    return HeadMaps(
        box_code=cast(Any, code.kind),
        bins=code.bins,
        deviations=list(detector.deviations),
        largest_log=LARGEST_LOG,
        activation="sigmoid",
        offset=grid.offset,
        step="stride" if grid.steps is None else "size // cells",
        score="root" if detector.root_of_score else "class" if quality is None else "product",
        levels=levels,
    )
