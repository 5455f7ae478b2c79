"""What the user typed becomes one complete recipe, each layer winning over the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from yoloxkd.assembly.models import build_detector, model_names, parse_student
from yoloxkd.assembly.prediction import default_size
from yoloxkd.assembly.recipes import check, recipe_file, resolve
from yoloxkd.assembly.run import check_size
from yoloxkd.config.files import cfg_names
from yoloxkd.config.load import read_yaml
from yoloxkd.config.recipe import Recipe
from yoloxkd.engine.device import choose_device
from yoloxkd.errors import UserError
from yoloxkd.kd.defaults import set_defaults

TEACHER = ["yolox-s@coco"]


def kd_keys(recipe: Recipe, method: str) -> dict[str, Any]:
    """A method's section as a file has it."""
    return recipe.kd[method].model_dump(by_alias=True)


@pytest.mark.parametrize("name", cfg_names("recipes"))
def test_every_shipped_recipe_resolves_to_itself(name: str) -> None:
    recipe = resolve(recipe=name)
    again = check(recipe.model_dump(by_alias=True, mode="json"))
    assert again == recipe
    check_size(recipe.train.imgsz, 32)


def test_the_students_own_recipe_is_the_base_and_options_win() -> None:
    recipe = resolve(student="yolox-nano", epochs=7, sets=["train.batch=8", "student.width=0.125"])
    assert (recipe.train.epochs, recipe.train.batch, recipe.train.imgsz) == (7, 8, 416)
    assert recipe.student.config.model_dump() == {"depth": 0.33, "width": 0.125, "depthwise": True}
    assert recipe.augment.mosaic == 0.5


@pytest.mark.parametrize("name", model_names())
def test_a_recipe_for_small_data_fits_every_student(name: str) -> None:
    config, own = resolve(recipe="small-data", student=name).student.config, parse_student({"name": name}).config
    keys = read_yaml(recipe_file("small-data"))["student"]
    fitting = {} if "@" in name else {key: keys[key] for key in keys if key in type(own).model_fields}
    assert config.model_dump() == own.model_dump() | fitting
    assert ("channels" in fitting) == ("@" not in name and not name.startswith("yolox"))


def test_a_recipe_with_another_student_leaves_its_backbone_and_its_typing_errors_are_found(tmp_path: Path) -> None:
    other = resolve(recipe="pgd-fcos-r101-r50", student="faster-rcnn-mobilenetv2", kd=["none"]).student.config
    assert (other.backbone, other.norm_frozen) == ("mobilenetv2_100", True)
    file = tmp_path / "r.yaml"
    file.write_text("student: {name: fcos-r50, chanels: 32}\n")
    with pytest.raises(UserError, match=r"unknown key 'student.chanels'.*did you mean 'student.channels'"):
        resolve(recipe=str(file), student="faster-rcnn-r50")


def test_a_recipe_file_names_the_student(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "student: {name: yolox-s}\ntrain: {epochs: 3}\nkd: {fgd: {alpha: 0.5}}\nteacher: {models: [yolox-m@coco]}\n"
    )
    recipe = resolve(recipe=str(file))
    assert recipe.student.name == "yolox-s"
    assert list(recipe.kd) == ["fgd"]
    published = resolve(student="yolox-s", teacher=TEACHER, kd=["fgd"])
    assert kd_keys(recipe, "fgd") == kd_keys(published, "fgd") | {"alpha": 0.5}
    assert resolve(recipe=str(file), kd=["none"]).kd == {}


def test_a_teacher_alone_means_pgd() -> None:
    assert list(resolve(student="yolox-nano", teacher=TEACHER).kd) == ["pgd"]
    assert resolve(student="yolox-nano", teacher=TEACHER, kd=["none"]).kd == {}


def test_a_set_of_defaults_goes_over_the_published_ones_and_under_what_is_set(tmp_path: Path) -> None:
    def pgd(**more: Any) -> dict[str, Any]:
        recipe = resolve(student="yolox-nano", teacher=TEACHER, **more)
        assert list(recipe.kd) == ["pgd"]
        return kd_keys(recipe, "pgd")

    published, small = pgd(kd=["pgd"]), pgd(kd=["pgd@small-data"])
    changed = set_defaults("pgd", "small-data", "yolox")
    assert changed == {"inherit": True}
    assert {key for key in published if small[key] != published[key]} == {"inherit"}
    assert pgd(kd=["pgd@small-data"], sets=["kd.inherit=false"]) == published
    # in a recipe it is a default, which the recipe's own keys change; on the command line it wins over the recipe
    file = tmp_path / "r.yaml"
    file.write_text("student: {name: yolox-nano}\nkd: {pgd@small-data: {inherit: false, k: 9}}\n")
    assert (pgd(recipe=str(file))["inherit"], pgd(recipe=str(file))["k"]) == (False, 9)
    over = pgd(recipe=str(file), kd=["pgd@small-data"])
    assert (over["inherit"], over["k"]) == (True, 9)
    with pytest.raises(UserError, match="given with two sets of defaults"):
        pgd(kd=["pgd", "pgd@small-data"])


def test_kd_keys_go_to_the_only_method_or_name_theirs() -> None:
    one = resolve(
        student="yolox-nano", teacher=TEACHER, kd=["fgd"], sets=["kd.tau=0.7", "kd.lambda=1e-3", "kd.weight=auto"]
    )
    assert [kd_keys(one, "fgd")[key] for key in ("tau", "lambda", "weight")] == [0.7, 0.001, "auto"]
    two = resolve(student="yolox-nano", teacher=TEACHER, kd=["fgd", "pgd"], sets=["kd.pgd.tau=0.7"])
    assert kd_keys(two, "pgd")["tau"] == 0.7
    assert kd_keys(two, "fgd")["tau"] != 0.7
    with pytest.raises(UserError, match=r"write kd.METHOD.tau with one of fgd, pgd"):
        resolve(student="yolox-nano", teacher=TEACHER, kd=["fgd", "pgd"], sets=["kd.tau=0.7"])
    with pytest.raises(UserError, match=r"key 'kd.lambda' is of fgd, and --kd pgd has no such key"):
        resolve(student="yolox-nano", teacher=TEACHER, kd=["pgd"], sets=["kd.lambda=1"])
    with pytest.raises(UserError, match=r"unknown key 'kd.tua'.*did you mean 'kd.tau'"):
        resolve(student="yolox-nano", teacher=TEACHER, kd=["pgd"], sets=["kd.tua=1"])


def test_every_contract_key_is_accepted_by_the_method_it_belongs_to() -> None:
    values = {
        "weight": 2,
        "warmup": 1,
        "stop_epoch": 3,
        "inherit": True,
        "tau": 0.6,
        "alpha": 0.1,
        "beta": 0.2,
        "gamma": 0.3,
    }
    for method, more in (
        ("pgd", {"foreground": "kde", "branches": "[neck, cls]", "k": 9, "delta": 0.1}),
        ("fgd", {"lambda": 0.1}),
    ):
        sets = [f"kd.{key}={value}" for key, value in (values | more).items()]
        recipe = resolve(student="yolox-nano", teacher=TEACHER, kd=[method], sets=sets)
        assert kd_keys(recipe, method)["alpha"] == 0.1
    sets = ["engine.compile=true", "val.backend=pycocotools", "teacher.min_ap=0", "student.depth=0.5"]
    recipe = resolve(student="yolox-nano", sets=sets)
    assert (recipe.engine.compile, recipe.val.backend, recipe.teacher.min_ap) == (True, "pycocotools", 0)


@pytest.mark.slow
def test_every_model_can_be_built_narrow() -> None:
    for name in model_names():
        yolox = name.startswith("yolox")
        keys: dict[str, Any] = {"width": 0.125, "depth": 0.33} if yolox else {"channels": 32}
        if not yolox:
            keys |= {"hidden": 32} if "-rcnn-" in name else {"stacked_convs": 1}
        if name.endswith(("r50", "r101", "x101-32x4d", "x101-64x4d")):
            keys["backbone"] = "resnet18"
        with torch.device("meta"):  # shapes alone: no weight is drawn
            detector = build_detector({"name": name} | keys, ["a", "b"])
        assert detector.names == ["a", "b"]


@pytest.mark.parametrize(("size", "near"), [(100, 96), (16, 32), (650, 640)])
def test_sizes_off_the_stride_are_refused_with_the_nearest(size: int, near: int) -> None:
    with pytest.raises(UserError, match=f"the nearest is {near}"):
        check_size(size, 32)


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UserError):
        choose_device("tpu")


def test_a_decay_that_the_run_is_too_short_for_is_refused_before_anything_else() -> None:
    with pytest.raises(UserError, match=r"kd\.decay_epochs 30 of pgd is after the distillation's end \(epoch 20\)"):
        resolve(
            student="yolox-nano",
            teacher=TEACHER,
            kd=["pgd"],
            epochs=20,
            sets=["kd.decay=cosine", "kd.decay_epochs=30"],
        )
    recipe = resolve(student="yolox-nano", teacher=TEACHER, kd=["cwd@yolo"], epochs=20)
    keys = recipe.kd["cwd"].model_dump(by_alias=True)
    assert (keys["normalize"], keys["decay"], keys["decay_floor"], keys["alpha"]) == (True, "cosine", 0.1, 1.0)


def test_what_a_schedule_for_int8_replaces_of_a_recipe_is_named(
    toy_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"student": str(toy_run / "best.pt"), "quantize": "int8"}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "student: {name: yolox-nano}\ntrain: {epochs: 40, imgsz: 256}\naugment: {mosaic: 0.5, mixup: 0.0}\nval: {interval: 7}\n"
    )
    short = resolve(recipe=str(recipe), epochs=5, **given)
    assert (short.train.epochs, short.train.imgsz, short.augment.mosaic, short.val.interval) == (5, 256, 0, None)
    (said,) = [record.getMessage() for record in caplog.records if "quantize int8" in record.getMessage()]
    assert "it replaces train.epochs 40, augment.mosaic 0.5, val.interval 7 of the recipe" in said
    caplog.clear()
    resolve(**given)
    recipe.write_text(recipe.read_text() + "quantize: int8\n")
    assert resolve(recipe=str(recipe), **given).train.epochs == 40
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("fcos-r50", (800, 1333)),
        ("fcos-r50@torchvision", (800, 1333)),
        ("retinanet-r50@torchvision-v2", (800, 1333)),
        ("faster-rcnn-mobilenetv3@torchvision", (800, 1333)),
        ("faster-rcnn-mobilenetv3@torchvision-320", (320, 640)),
        ("cascade-mask-rcnn-x101-32x4d", (800, 1333)),
        ("yolox-nano", 416),
        ("no-such-model", 640),
    ],
)
def test_a_published_model_has_its_own_input_size(name: str, size: Any) -> None:
    assert default_size(name) == size
