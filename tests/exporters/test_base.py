"""The reduced copy that is exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.exporters.tiny import TinyDetector
from yoloxkd.exporters import EXPORTERS, RUNTIMES_OF
from yoloxkd.exporters.base import Exportable, fold_batch_norm
from yoloxkd.file_kinds import EXPORTED
from yoloxkd.types import DenseOutput


def test_the_copy_gives_the_boxes_and_scores_of_the_model_without_its_batch_norms(pixels: Tensor) -> None:
    detector = TinyDetector(["a", "b"]).eval()
    plain = Exportable(detector)
    with torch.no_grad():
        out = detector(pixels)
        boxes, scores = plain(pixels.float())
    assert not [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(boxes, out.boxes, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(scores, detector.scores(out), atol=1e-6, rtol=1e-5)


def test_a_norm_that_two_convolutions_share_is_left_alone(pixels: Tensor) -> None:
    class Shared(TinyDetector):
        """Both levels go through the stem's norm."""

        def network(self, x: Tensor) -> DenseOutput:
            self.down[1] = self.stem[1]
            return super().network(x)

    detector = Shared(["a"]).eval()
    with torch.no_grad():
        before = detector(pixels).boxes
        fold_batch_norm(detector)
        after = detector(pixels).boxes
    assert [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-5)


def test_formats_are_known_by_name() -> None:
    import pytest

    from yoloxkd.errors import UserError

    assert set(EXPORTERS) == {"onnx", "ncnn", "tflite", "executorch"} == set(RUNTIMES_OF) == set(EXPORTED)
    with pytest.raises(UserError, match="unknown export format 'tensorrt'; known: executorch, ncnn, onnx, tflite"):
        EXPORTERS.find("tensorrt")
