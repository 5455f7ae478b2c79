"""Training for int8: the recipe it gets, its run and checkpoints, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import TINY
from tests.engine.runs import StopAt, same_file
from tests.exporters.tiny import TinyDetector
from yoloxkd import Detector, Trainer, UserError
from yoloxkd.assembly.recipes import check, resolve
from yoloxkd.config.files import cfg_folder
from yoloxkd.engine.callbacks.activation_ranges import ActivationRanges
from yoloxkd.errors import Interrupted
from yoloxkd.nn.fake_quantization import activation_quantizers, fake_quantize, quantized_layers


def quantized_run(best: Path, out: Path, **more: Any) -> Trainer:
    options: dict[str, Any] = {
        "epochs": 2,
        "batch": 8,
        "out": out,
        "set": {"quantize.images": 8, "val.interval": 2, "optim.lr_per_image": 1e-5},
    }
    return Trainer(student=str(best), teacher=str(best), quantize="int8", **(options | more))


@pytest.fixture(scope="module")
def run(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under the float32 student, by the recipe beside it."""
    return quantized_run(toy_run / "best.pt", tmp_path_factory.mktemp("int8") / "run").fit().out


def test_the_recipe_is_the_student_s_own_shorter_and_gentler(toy_run: Path) -> None:
    before = check(yaml.safe_load((toy_run / "recipe.yaml").read_text()))
    recipe = resolve(student=str(toy_run / "best.pt"), teacher=[str(toy_run / "best.pt")], quantize="int8")
    assert recipe.quantize.kind == "int8"
    assert (recipe.data, recipe.train.imgsz) == (before.data, 64)
    assert (recipe.train.epochs, recipe.train.batch) == (15, 8)
    assert (recipe.optim.kind, recipe.optim.lr_per_image) == ("adam", 0.00025)
    assert recipe.optim.momentum == before.optim.momentum
    assert (recipe.augment.mosaic, recipe.augment.multiscale) == (0, (0, 0))
    assert list(recipe.kd) == ["response", "pkd"]
    again = resolve(
        recipe=None, student=str(toy_run / "best.pt"), quantize="int8", epochs=3, sets=["optim.lr_per_image=0.5"]
    )
    assert (again.train.epochs, again.optim.lr_per_image) == (3, 0.5)
    assert again.kd == {}


def test_every_number_of_the_short_schedule_says_where_it_comes_from() -> None:
    lines = (cfg_folder() / "quantize.yaml").read_text().splitlines()
    assert not [
        line for line in lines if any(c.isdigit() for c in line.partition(":")[2].partition("#")[0]) and "#" not in line
    ]


def test_a_recipe_that_is_for_int8_already_stays_as_it_is(toy_run: Path, tmp_path: Path) -> None:
    recipe = resolve(student=str(toy_run / "best.pt"), quantize="int8", epochs=3)
    written = tmp_path / "recipe.yaml"
    written.write_text(yaml.safe_dump(recipe.model_dump(by_alias=True, mode="json")))
    assert resolve(recipe=str(written)) == recipe
    assert resolve(recipe=str(written), quantize="int8") == recipe
    short = check(recipe.model_dump(by_alias=True, mode="json") | {"quantize": "int8"})
    assert short.quantize.kind == "int8"


def test_the_checkpoint_is_a_detector_with_its_scales(run: Path, toy: Path, toy_run: Path) -> None:
    saved = torch.load(run / "best.pt", weights_only=True)
    assert saved["quantize"]["kind"] == "int8"
    assert "head.obj_preds.0.input.scale" in saved["model"]
    detector = Detector(run / "best.pt", "cpu")
    assert detector.precision == "int8"
    layers = quantized_layers(detector.network)
    assert len(layers) == len(
        [m for m in Detector(toy_run / "best.pt", "cpu").network.modules() if isinstance(m, torch.nn.Conv2d)]
    )
    assert torch.equal(layers["head.obj_preds.0"].input.scale, saved["model"]["head.obj_preds.0.input.scale"])
    assert not any(bool(q.scale == 1) and bool(q.lowest == 0) for q in activation_quantizers(detector.network)[1:])
    before = Detector(toy_run / "best.pt", "cpu").val(str(toy), workers=0)["AP"]
    assert before > 0.2
    assert detector.val(str(toy), workers=0)["AP"] > before - 0.1
    log = (run / "train.log").read_text()
    assert "convolutions, 7-bit weights, 8-bit inputs and outputs" in log
    assert "compared with itself" not in log


@pytest.mark.slow
def test_stopped_and_resumed_is_the_same_run(run: Path, toy_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        quantized_run(toy_run / "best.pt", out, callbacks=[StopAt(2)]).fit()
    Trainer(resume=out).fit()
    assert same_file(run / "best.pt", out / "best.pt")


def test_ranges_stay_for_the_last_part() -> None:
    model = TinyDetector(["red", "blue"])
    fake_quantize(model, 8)
    state: Any = SimpleNamespace(detector=model.train(), iteration=0, epochs=2, iters_per_epoch=5)
    ranges = ActivationRanges(momentum=0.5, freeze=0.7)
    ranges.on_fit_start(state)
    scales = []
    for state.iteration in range(1, 11):
        model(torch.full((1, 3, 64, 64), 25.0 * state.iteration))
        ranges.on_step(state)
        scales.append(float(activation_quantizers(model)[0].scale))
    assert len(set(scales[:7])) == 7
    assert set(scales[6:]) == {scales[6]}
    later = ActivationRanges(momentum=0.5, freeze=0.7)  # of a run that goes on after the seventh step
    state.iteration = 7
    later.on_fit_start(state)
    assert not any(quantizer.observing for quantizer in activation_quantizers(model))


def test_what_cannot_be_quantized(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    best = str(toy_run / "best.pt")
    with pytest.raises(UserError, match=r"--quantize int8 rounds a student that is trained already.*--student"):
        Trainer(student="yolox-nano", data=str(toy), quantize="int8", out=tmp_path / "a")
    with pytest.raises(UserError, match=r"quantize.kind.*'off' or 'int8', got 'int4'"):
        Trainer(student=best, quantize="int4", out=tmp_path / "a")
    with pytest.raises(UserError, match=r"leave out --quantize"):
        Trainer(resume=toy_run, quantize="int8")
    other = torch.load(best, weights_only=True)
    other["names"] = ["red", "green"]
    torch.save(other, tmp_path / "other.pt")
    options: dict[str, Any] = {"data": str(toy), "imgsz": 64, "epochs": 1, "batch": 8, "device": "cpu", "set": TINY}
    with pytest.raises(UserError, match=r"other.pt has the classes red, green where the student has red, blue"):
        Trainer(student=best, teacher=str(tmp_path / "other.pt"), quantize="int8", out=tmp_path / "b", **options).fit()
    with pytest.raises(UserError, match=r"leaves a part of it untrained on this data .*class predictors"):
        Trainer(student=str(tmp_path / "other.pt"), quantize="int8", out=tmp_path / "c", **options).fit()
    assert not any((tmp_path / name).exists() for name in "abc")


@pytest.mark.slow
def test_an_export_of_it_calibrates_nothing(run: Path, tmp_path: Path) -> None:
    detector = Detector(run / "best.pt", "cpu")
    with pytest.raises(UserError, match=r"calib: .*best.pt is trained for int8 and has its own ranges"):
        detector.export(tmp_path / "x.onnx", int8=True, calib="shapes")
    with pytest.raises(UserError, match=r"trained for int8, .* give --int8"):
        detector.export(tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_its_file_passes_the_gate(run: Path, toy: Path, tmp_path: Path) -> None:
    file = Detector(run / "best.pt", "cpu").export(tmp_path / "x.onnx", int8=True, nms=False, verify=str(toy), say=None)
    exported = Detector(file)
    assert exported.precision == "int8"
    assert exported.val(str(toy), workers=0)["AP"] == pytest.approx(
        Detector(run / "best.pt", "cpu").val(str(toy), workers=0)["AP"], abs=0.02
    )
