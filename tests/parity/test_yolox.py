"""The YOLOX network, its decoding, assignment, losses and gradients against the reference vectors."""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.losses import task
from tests.parity.vectors import Case, cases
from yoloxkd.config.files import cfg_folder
from yoloxkd.config.load import read_yaml
from yoloxkd.nn.assigners.simota import simota
from yoloxkd.nn.dense.dense_detector import Predictions
from yoloxkd.nn.dense.yolox import YOLOX
from yoloxkd.ops.boxes import to_center, to_corners
from yoloxkd.types import DenseOutput, Targets

MODELS = cases("yolox", "model")
HEADS = cases("yolox", "head")
EXACT = {torch.float64: 1e-9, torch.float32: 1e-4}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def network(size: str, classes: int) -> YOLOX:
    keys = read_yaml(cfg_folder() / "models" / f"yolox-{size}.yaml")
    assert keys.pop("family") == "yolox"
    return YOLOX(YOLOX.Config(**keys), [f"class{i}" for i in range(classes)])


def recipe_tensor(name: str, shape: tuple[int, ...], weight_seed: int) -> Tensor:
    """The reference weights' recipe: a seeded normal draw, scaled by the kind of tensor."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    z = np.random.RandomState((zlib.crc32(name.encode()) + weight_seed) % 2**32).standard_normal(shape)
    if len(shape) == 4:
        stem = name.endswith("backbone.stem.conv.conv.weight")
        gain = 1.37 / 150 if stem else 1.5 if "_preds" in name else 1.37
        z = z * gain / np.sqrt(shape[1] * shape[2] * shape[3])
    elif name.endswith("running_var"):
        z = np.exp(0.2 * z)
    elif name.endswith("running_mean"):
        z = 0.1 * z
    elif name.endswith(".weight"):
        z = 1 + 0.1 * z
    elif "_preds" in name:
        z = 0.1 * z - (0 if "reg_preds" in name else 2)
    else:
        z = 0.4 * z
    return torch.from_numpy(z.astype(np.float32))


def loaded(case: Case) -> YOLOX:
    """The case's network; built once, so a test must leave its weights and statistics as they were."""
    if str(case) not in _loaded:
        _loaded[str(case)] = build(case)
    return _loaded[str(case)]


_loaded: dict[str, YOLOX] = {}


def build(case: Case) -> YOLOX:
    model = network(case.params["model"], case.params["num_classes"])
    seed = case.params["weight_seed"]
    state = {name: recipe_tensor(name, tuple(v.shape), seed) for name, v in model.state_dict().items()}
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()
    assert digest == case.params["weights_sha256"], "the state dict differs from the official one in names or order"
    model.load_state_dict(state)
    return model


def image_of(case: Case) -> Tensor:
    shape = case.params["image_shape"]
    image = np.random.RandomState(case.params["image_seed"]).random_sample(shape) * 255
    image = image.astype(np.float32)
    assert hashlib.sha256(image.tobytes()).hexdigest() == case.params["image_sha256"]
    return torch.from_numpy(image)


def targets_of(case: Case, dtype: torch.dtype) -> Targets:
    labels = case.tensor("labels")
    mask = labels.sum(-1) > 0
    boxes = to_corners(labels[..., 1:]).to(dtype)
    return Targets(boxes, labels[..., 0].long(), mask, torch.zeros_like(mask))


def table(out: DenseOutput, box: Tensor) -> Tensor:
    assert out.quality is not None
    return torch.cat((box, out.quality.unsqueeze(-1), out.cls_logits), dim=-1)


def raw_table(out: DenseOutput, box: Tensor) -> Tensor:
    t = table(out, box)
    return torch.cat((box, t[..., 4:].sigmoid()), dim=-1)


def close(got: Tensor, expected: Tensor, rtol: float) -> None:
    atol = rtol * float(expected.abs().amax()) if expected.numel() else 0.0
    torch.testing.assert_close(got.detach(), expected.to(got.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("size", ["nano", "tiny", "s"])
def test_state_dict_is_the_official_one(size: str) -> None:
    first = MODELS[0].values[0]
    if first is None:
        pytest.skip("reference vectors 'yolox' are not there (set YOLOXKD_VECTORS)")
    keys = json.loads((first.folder / f"yolox_{size}_keys.json").read_text())
    model = network(size, keys["classes"])
    state = model.state_dict()
    assert list(state) == keys["order_of_keys"]
    assert {name: list(v.shape) for name, v in state.items()} == keys["shapes"]
    assert sum(p.numel() for p in model.parameters()) == keys["trainable_parameters"]


@pytest.mark.parametrize("case", MODELS)
def test_network_outputs_in_float64(case: Case) -> None:
    model = loaded(case).double().eval()
    image = image_of(case).double()
    with torch.no_grad():
        if case.has("feat_dark3"):
            for got, stage in zip(model.backbone.backbone(image), (3, 4, 5), strict=True):
                close(got, case.tensor(f"feat_dark{stage}"), 1e-9)
            for got, stride in zip(model.backbone(image), model.spec.strides, strict=True):
                close(got, case.tensor(f"pan_{stride}"), 1e-9)
        out = model.network(image)
    close(raw_table(out, out.box_raw), case.tensor("raw"), 1e-9)
    close(raw_table(out, to_center(out.boxes)), case.tensor("decoded"), 1e-9)
    scores = case.tensor("decoded")
    close(model.scores(out), scores[..., 5:] * scores[..., 4:5], 1e-9)
    assert case.params["num_params"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", MODELS)
def test_network_outputs_in_float32(case: Case) -> None:
    model = loaded(case).float().eval()
    with torch.no_grad():
        out = model.network(image_of(case))
    close(raw_table(out, to_center(out.boxes)), case.tensor("decoded"), 1e-4)
    if case.has("decoded_f32"):
        close(raw_table(out, to_center(out.boxes)), case.tensor("decoded_f32"), 1e-4)


def check_losses(model: YOLOX, out: DenseOutput, case: Case, of_total: float = 0.0) -> None:
    """Assignment and losses; `of_total` allows each term that share of the total on top of its relative tolerance."""
    dtype = out.boxes.dtype
    rtol = EXACT[dtype]
    targets = targets_of(case, dtype)
    match = simota(out, targets)
    if dtype == torch.float64 or case.params["assignment_same_in_f32"]:
        assert torch.equal(match.fg, case.tensor("fg_mask").bool())
        assert torch.equal(match.gt, case.tensor("matched_gt"))
    close(match.score, case.tensor("matched_iou"), rtol if dtype == torch.float64 else 1e-3)
    ratio = match.fg.sum().clamp(min=1) / targets.mask.sum().clamp(min=1)
    assert float(ratio) == pytest.approx(float(case.array("num_fg_ratio")), rel=1e-6)

    model.final_phase(False)
    plain = task(model, out, targets)
    model.final_phase(True)
    final = task(model, out, targets)
    model.final_phase(False)
    assert list(plain) == ["box", "obj", "cls"]
    assert list(final) == ["box", "obj", "cls", "l1"]
    atol = max(1e-12, of_total * float(case.array("total_l1")))
    expected = {"box": "iou", "obj": "obj", "cls": "cls", "l1": "l1"}
    for losses, total in ((plain, "total"), (final, "total_l1")):
        for name, value in losses.items():
            assert value.dtype == dtype
            assert float(value.detach()) == pytest.approx(float(case.array(expected[name])), rel=rtol, abs=atol), name
        found = float(sum(v.detach() for v in losses.values()))
        assert found == pytest.approx(float(case.array(total)), rel=rtol)
    found = float(sum(v.detach() for v in plain.values()))
    assert found == pytest.approx(float(case.array("total_f32")), rel=1e-4)


@DTYPES
@pytest.mark.parametrize("case", MODELS)
def test_training_outputs_and_losses_of_the_network(case: Case, dtype: torch.dtype) -> None:
    model = loaded(case).to(dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    out = model.train().network(image_of(case).to(dtype))
    model.load_state_dict(before)
    got, expected = table(out, to_center(out.boxes)).detach(), case.tensor("train_decoded", dtype)
    if dtype == torch.float64:
        close(got, expected, 1e-9)
        check_losses(model, out, case)
    else:
        # Batch statistics over the four cells of a 2x2 map amplify float32's roundings of single numbers: the outputs are
        # compared as a whole, and may be off by five times what rounding the weights does to them; a loss term may be off
        # by 1e-4 of the total loss.
        assert float((got - expected).norm() / expected.norm()) < 5 * amplified_rounding(case)
        check_losses(model, out, case, of_total=1e-4)


def amplified_rounding(case: Case, draws: int = 4) -> float:
    """What errors of float32's size in the weights do to the outputs in training mode, computed in float64: the largest
    relative deviation of the outputs as a whole."""
    g = torch.Generator().manual_seed(0)
    expected, largest = case.tensor("train_decoded", torch.float64), 0.0
    for _ in range(draws):
        model = loaded(case).double().train()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + torch.finfo(torch.float32).eps * torch.randn(p.shape, generator=g, dtype=p.dtype))
            out = model.network(image_of(case).double())
        largest = max(largest, float((table(out, to_center(out.boxes)) - expected).norm() / expected.norm()))
    return largest


def head_output(case: Case, dtype: torch.dtype) -> tuple[YOLOX, DenseOutput, list[Tensor]]:
    model = network("nano", case.params["num_classes"])
    raw = [case.tensor(name, dtype).requires_grad_() for name in case.family("raw_level")]
    parts: list[tuple[Any, ...]] = [r.split((4, 1, r.shape[1] - 5), dim=1) for r in raw]
    out = model.assemble(Predictions(*([p[i] for p in parts] for i in (2, 0, 1))), tuple(case.params["image"]))
    return model, out, raw


@DTYPES
@pytest.mark.parametrize("case", HEADS)
def test_losses_of_hand_made_outputs(case: Case, dtype: torch.dtype) -> None:
    model, out, _ = head_output(case, dtype)
    close(table(out, to_center(out.boxes)), case.tensor("train_decoded"), EXACT[dtype])
    check_losses(model, out, case)


@pytest.mark.parametrize("case", HEADS)
def test_targets_of_hand_made_outputs(case: Case) -> None:
    _, out, _ = head_output(case, torch.float64)
    targets = targets_of(case, torch.float64)
    match = simota(out, targets)
    image, cell = match.fg.nonzero(as_tuple=True)
    row = match.gt[image, cell]
    close(to_center(targets.boxes[image, row]), case.tensor("reg_target"), 1e-9)
    one_hot = torch.nn.functional.one_hot(targets.labels[image, row], case.params["num_classes"])
    close(one_hot * match.score[image, cell].unsqueeze(-1), case.tensor("cls_target"), 1e-9)


@DTYPES
@pytest.mark.parametrize("case", HEADS)
def test_gradients_of_hand_made_outputs(case: Case, dtype: torch.dtype) -> None:
    model, out, raw = head_output(case, dtype)
    model.final_phase(True)
    sum(task(model, out, targets_of(case, dtype)).values()).backward()  # type: ignore[union-attr]
    for tensor, name in zip(raw, case.family("grad_raw_level"), strict=True):
        assert tensor.grad is not None
        close(tensor.grad, case.tensor(name), 1e-9 if dtype == torch.float64 else 1e-4)
