"""SOLO keeps the contract of detectors, and what masks without boxes add to it."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from tests.losses import means, task
from tests.nn.contract import NAMES, boxes_of, pictures
from tests.nn.two_stage.contract import check_file, with_masks
from yoloxkd.assembly.models import open_model
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.engine.step import TrainStep
from yoloxkd.errors import UserError
from yoloxkd.exporters.base import Exportable
from yoloxkd.exporters.nms_graph import CELLS, WithMatrixNMS
from yoloxkd.exporters.onnx import ExportOptions
from yoloxkd.exporters.parity import export_checked
from yoloxkd.kd.rescaled_teacher import RescaledTeacher
from yoloxkd.nn.fake_quantization import fake_quantize, observe
from yoloxkd.nn.solo.key_map import mmdetection_solo
from yoloxkd.nn.solo.solo import SOLO, SOLOOutput
from yoloxkd.ops.nms import NMS
from yoloxkd.soft_masks import BoxMasks, FrameMasks
from yoloxkd.types import Batch, Detections, ImageMeta, Targets

SIZE = 96
KEYS: dict[str, Any] = {
    "backbone": "mobilenetv2_035", "backbone_weights": "none", "frozen_stages": 0, "norm_eval": False, "channels": 16,
    "hidden": 8, "stacked_convs": 1, "groups": 4, "grids": (6, 5, 4, 3, 2), "pairs": 40, "score_threshold": 0.0,
    "ranges": ((1, 24), (12, 40), (24, 60), (40, 120), (60, 512)),
}  # fmt: skip


def narrow_solo(kind: type[SOLO], names: list[str], **changes: Any) -> SOLO:
    """SOLO with random weights, small enough for tests."""
    return kind(kind.Config(**(KEYS | changes)), names)


@pytest.fixture
def model() -> SOLO:
    torch.manual_seed(0)
    found = narrow_solo(SOLO, NAMES).train()
    for module in found.modules():  # statistics of evaluation, so that images are independent
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    return found


def seen(model: SOLO, count: int, size: int = SIZE) -> SOLOOutput:
    with torch.no_grad():
        out: SOLOOutput = model(pictures(count, size, size))
    return out


def truth(count: int, rows: int) -> Targets:
    return with_masks(boxes_of(count, rows, SIZE), SIZE)


def eager(model: SOLO) -> SOLO:
    """Masks and classes that are not all below their thresholds."""
    for predictor in (*model.mask_head.conv_mask_list, model.mask_head.conv_cls):
        nn.init.normal_(predictor.get_parameter("weight"), std=0.5)
        nn.init.zeros_(predictor.get_parameter("bias"))
    return model.eval()


def test_shapes(model: SOLO) -> None:
    with torch.no_grad():
        out = model(pictures(2, SIZE, SIZE + 32))
    assert out.grid.sizes == ((6, 6), (5, 5), (4, 4), (3, 3), (2, 2))
    assert out.cls_logits.shape == (2, 90, len(NAMES))
    assert [tuple(m.shape[2:]) for m in out.mask_features] == [(24, 32), (24, 32), (12, 16), (6, 8), (6, 8)]
    assert [tuple(m.shape[2:]) for m in out.features] == [(24, 32), (12, 16), (6, 8), (3, 4)]
    points = out.grid.points
    assert points[0].tolist() == pytest.approx([128 / 12, 96 / 12])
    assert points[-1].tolist() == [96.0, 72.0]


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_losses_with_any_number_of_objects(model: SOLO, rows: int) -> None:
    losses = task(model, model(pictures(2, SIZE, SIZE)), truth(2, rows))
    assert set(losses) == {"cls", "mask"}
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    assert (losses["mask"] > 0) == (rows > 0)
    torch.stack(list(losses.values())).sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_an_object_without_a_mask_is_background(model: SOLO) -> None:
    targets, out = truth(1, 3), seen(model, 1)
    assert targets.masks is not None
    targets.masks[:, 1] = False
    match = model.assign(out, targets)
    assert set(match.gt[match.fg].tolist()) <= {0, 2}
    targets.masks = None
    with pytest.raises(UserError, match="learns from masks, and the data has none"):
        model.assign(out, targets)


def test_ignore_regions_and_padding_are_no_background(model: SOLO) -> None:
    targets, out = truth(1, 2), seen(model, 1)
    targets.boxes[0, 1] = torch.tensor([SIZE / 2, 0.0, SIZE, SIZE])
    targets.mask[0, 1], targets.ignore[0, 1] = False, True
    match = model.assign(out, targets)
    inside = out.grid.points[:, 0] > SIZE / 2
    assert (match.ignored | match.fg)[0, inside].all()
    targets.ignore[:] = False
    targets.content = torch.tensor([[0.0, 0.0, SIZE / 2, SIZE]])
    assert (model.assign(out, targets).ignored | match.fg)[0, inside].all()


def test_the_parts_of_a_batch_add_up(model: SOLO) -> None:
    """The class loss is divided by the positives of the whole batch and one."""
    targets, images = truth(4, 3), pictures(4, SIZE, SIZE)
    whole = means(model.losses(out := model(images), targets, model.assign(out, targets)))
    parts = []
    for first in range(2):
        some = targets.map(itemgetter(slice(first, None, 2)))
        out = model(images[first::2])
        parts.append(model.losses(out, some, model.assign(out, some)))
    for name in parts[0]:
        counts = [part[name].count for part in parts]
        assert counts[0] is not None
        assert counts[1] is not None
        total = (counts[0] + counts[1]).detach()
        shares = [part[name].share(total, parts=2) for part in parts]
        torch.testing.assert_close(shares[0] + shares[1], whole[str(name)])


def test_bf16_autocast(model: SOLO) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(pictures(1, SIZE, SIZE))
        losses = task(model, out, truth(1, 2))
        boxes, scores = model.candidates(out)
    assert {v.dtype for v in losses.values()} == {boxes.dtype, scores.dtype} == {torch.float32}


def test_detections_have_masks_and_their_boxes(model: SOLO) -> None:
    out = seen(eager(model), 2)
    boxes, scores = model.candidates(out)
    assert boxes.shape == (2, 40, 4)
    assert scores.shape == (2, 40, len(NAMES))
    assert ((scores > 0).sum(-1) <= 1).all()
    meta = ImageMeta(0, "", 2 * SIZE - 20, 2 * SIZE, scale=0.5)
    for found in model.detect(out, NMS(conf=1e-3, max_det=5)):
        assert len(found) == 5
        placed = found.to_image(meta)
        assert placed.masks is not None
        assert placed.masks.shape == (5, meta.height, meta.width)
        for box, mask in zip(placed.boxes, placed.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert [len(found) for found in model.detect(out, NMS(conf=0.999))] == [0, 0]


def test_an_image_does_not_depend_on_its_neighbors(model: SOLO) -> None:
    model = eager(model)
    together = seen(model, 3)
    with torch.no_grad():
        alone = model(pictures(3, SIZE, SIZE)[1:2])
    for a, b in zip(model.objects(alone, 0), model.objects(together, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_teacher_at_another_scale_speaks_of_the_given_input(model: SOLO) -> None:
    out = RescaledTeacher(eager(model), 2.0)(pictures(1, SIZE, SIZE))
    assert out.image_size == (SIZE, SIZE)
    assert (out.grid.points <= SIZE).all()
    assert model.candidates(out)[0].amax() <= SIZE


def test_a_step_of_the_engine(model: SOLO) -> None:
    content = torch.tensor([[0.0, 0.0, SIZE, SIZE]] * 2)
    batch = Batch(pictures(2, SIZE, SIZE), truth(2, 3), content)
    first = means(TrainStep(model, nn.ModuleDict())(batch))
    assert set(first) == {"cls", "mask"}


def test_class_predictors_are_the_layers_that_depend_on_the_classes(model: SOLO) -> None:
    other, own = narrow_solo(SOLO, [*NAMES, "yellow"]).state_dict(), model.state_dict()
    differ = {key for key in own if own[key].shape != other[key].shape}
    assert differ == {key for key in own if key.startswith(model.class_predictors)}


def test_what_is_refused(model: SOLO) -> None:
    with pytest.raises(UserError, match=r"100x96.*multiples of 32"):
        model(torch.zeros(1, 3, 100, 96))
    for precision in ("half", "int8"):
        with pytest.raises(UserError, match="a solo is exported in float32, or in int8 if it is trained for it"):
            ExportOptions(96, **{precision: True}).check(model)
    with pytest.raises(UserError, match=r"a solo gives masks to what its NMS leaves.*leave --no-nms out"):
        ExportOptions(96, nms=False).check(model)


@pytest.mark.parametrize("max_det", [5, 60])  # fewer than there are, and more than there can be
def test_a_graph_of_fixed_shapes_gives_what_the_model_detects(model: SOLO, max_det: int) -> None:
    graph = WithMatrixNMS(Exportable(eager(model)), conf=0.01, max_det=max_det)
    graph.detector = model  # with its batch norms not folded: no cell at the threshold falls to the other side
    image = pictures(1, SIZE, SIZE)
    with torch.no_grad():
        (expected,) = model.detect(model(image), NMS(conf=0.01, max_det=max_det))
        boxes, scores, labels, counts, masks = (x[0].numpy() for x in graph(image))
    n = len(expected)
    assert 5 <= n == counts < 60
    np.testing.assert_allclose(boxes[:n], expected.boxes, atol=1e-3)
    np.testing.assert_allclose(scores[:n], expected.scores, atol=1e-4)
    assert labels[:n].tolist() == expected.labels.tolist()
    assert isinstance(expected.soft_masks, FrameMasks)
    np.testing.assert_allclose(masks[:n], expected.soft_masks.in_boxes(expected.boxes, CELLS).probability, atol=1e-3)
    assert not boxes[n:].any()
    assert not masks[n:].any()
    assert (labels[n:] == -1).all()
    meta = ImageMeta(0, "", SIZE, SIZE)
    file = Detections(boxes[:n], scores[:n], labels[:n], NAMES, soft_masks=BoxMasks(masks[:n])).to_image(meta)
    whole = expected.to_image(meta)
    assert file.masks is not None
    assert whole.masks is not None
    for mask, other in zip(
        file.masks[:5], whole.masks[:5], strict=True
    ):  # masks of few cells lose more at a box's edge
        assert (mask & other).sum() > 0.9 * (mask | other).sum()


@pytest.mark.slow
def test_export_parity(model: SOLO, toy: Path, tmp_path: Path) -> None:
    data = load_split(find_data(str(toy)), "val")
    options = ExportOptions(SIZE, conf=1e-5)
    path = export_checked(eager(model), tmp_path / "x.onnx", options, data=data)
    note = json.loads(path.with_suffix(".parity.json").read_text())
    assert note["passed"]
    assert note["found"]["detections"] > 0
    assert note["found"]["min_mask_iou"] > 0.99
    check_file(path, model, data.read(0))


@pytest.mark.slow
def test_one_trained_for_int8_is_exported_in_int8(model: SOLO, toy: Path, tmp_path: Path) -> None:
    quantized = eager(model)
    fake_quantize(quantized, 7)
    observe(quantized, iter([pictures(2, SIZE, SIZE).float()]))
    data = load_split(find_data(str(toy)), "val")
    path = export_checked(quantized, tmp_path / "x.onnx", ExportOptions(SIZE, int8=True, conf=1e-5), data=data)
    note = json.loads(path.with_suffix(".parity.json").read_text())
    assert note["passed"]
    assert note["found"]["detections"] > 0
    made = onnx.load(str(path))
    convolutions = [node for node in made.graph.node if node.op_type == "Conv"]
    integers = {node.output[0] for node in made.graph.node if node.op_type == "DequantizeLinear"}
    assert len(convolutions) > 20
    assert all(set(node.input[:2]) <= integers for node in convolutions)


def test_mmdetections_files_open(model: SOLO, tmp_path: Path) -> None:
    from tests.nn.test_mmdet_weights import their_key

    torch.manual_seed(0)
    own = narrow_solo(SOLO, NAMES, backbone="mobilenetv2_100")
    state: dict[str, Tensor] = {their_key(k, mobile=True): v for k, v in own.state_dict().items()}
    text = "norm_cfg=dict(type='GN', num_groups=4)"
    torch.save({"meta": {"CLASSES": NAMES, "config": text}, "state_dict": state}, tmp_path / "epoch_12.pth")
    opened = open_model(str(tmp_path / "epoch_12.pth"))
    assert (opened.name, opened.report.complete) == ("solo-mobilenetv2", True)
    assert all(
        torch.equal(a, b) for a, b in zip(opened.detector.state_dict().values(), own.state_dict().values(), strict=True)
    )
    with pytest.raises(UserError, match="decoupled SOLO"):
        mmdetection_solo({"mask_head.conv_mask_list_x.0.weight": torch.zeros(1)})
