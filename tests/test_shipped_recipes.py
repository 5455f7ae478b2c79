"""Every shipped recipe trains: two steps of it on images and networks of a size for tests, all else as the file has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_toy
from tests.nn.fpn import BACKBONE
from yoloxkd import Trainer
from yoloxkd.assembly.models import build_detector
from yoloxkd.assembly.recipes import resolve
from yoloxkd.config.files import cfg_names
from yoloxkd.config.recipe import Recipe
from yoloxkd.engine.checkpoint import save_checkpoint
from yoloxkd.engine.events import Callback, State

NARROW: dict[str, dict[str, Any]] = {
    "yolox": {"width": 0.125, "depth": 0.33},
    "fpn": {
        "backbone": BACKBONE,
        "backbone_weights": "none",
        "channels": 16,
        "groups": 4,
        "stacked_convs": 1,
        "deformable_stages": 0,
    },
    "rcnn": {
        "backbone": BACKBONE,
        "backbone_weights": "none",
        "channels": 16,
        "hidden": 24,
        "train_anchors": 60,
        "train_proposals": 60,
        "test_anchors": 40,
        "test_proposals": 30,
        "region_samples": 32,
        "deformable_stages": 0,
    },
    "mask": {"mask_hidden": 8, "mask_convs": 1},
}
NARROW["solo"] = {
    k: NARROW["fpn"][k] for k in ("backbone", "backbone_weights", "channels", "groups", "stacked_convs")
} | {
    "hidden": 16,
    "grids": (6, 5, 4, 3, 2),
}
"""Keys by the kind of detector."""


SIDES = {"pgd-ddod-crowdhuman-r101-r50": (800, 1400), "fgd-faster-rcnn-cityscapes-r101-r50": (1024, 2048)}
"""Short and long side at most, where they are not 800 and 1333."""


YOLOX_TWINS = ("yolox-m", "yolox-s", "yolox-tiny", "yolox-x")
TWINS = ("-r101", "-x101-32x4d", "-x101-64x4d", "-mobilenetv2", "-effnet-lite0")
FAMILY_TRAINED_WITH_EVERY_BACKBONE = "fcos"
DISTILLED_TWINS = (
    "fgd-retinanet-x101-r50", "pgd-atss-r50-r50", "pgd-atss-r101-mobilenetv2", "pgd-fcos-r50-r50",
)  # fmt: skip
"""As another row of the same families but for the networks' sizes and, of the MobileNetV2, the weight."""


def recipes_that_differ() -> list[str]:
    """Without those that differ from their family's r50 in backbone and schedule alone: it is the same narrow one here.

    What their files say is tested for every recipe; FCOS stands for their schedules.
    """
    trained = ("fgd-", "pgd-", FAMILY_TRAINED_WITH_EVERY_BACKBONE, "small-data", "yolox-nano", "yolox-l")
    names = [name for name in cfg_names("recipes") if name not in DISTILLED_TWINS]
    return [name for name in names if name.startswith(trained) or not name.endswith((*TWINS, *YOLOX_TWINS))]


def narrow_keys(name: str) -> dict[str, Any]:
    if name.startswith("yolox"):
        return NARROW["yolox"]
    if name.startswith("solo"):
        return NARROW["solo"]
    if "-rcnn-" in name:
        return NARROW["rcnn"] | (NARROW["mask"] if "mask-" in name else {})
    keys = NARROW["fpn"]
    return {k: v for k, v in keys.items() if k != "groups"} if name.startswith("retinanet") else keys


FAST = {"engine.workers": 0, "teacher.min_ap": 0, "callbacks.report": False, "callbacks.plots": False}


class Watch(Callback):
    """Keeps what a recipe decides and a run's folder does not tell."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.sizes: list[tuple[int, int]] = []

    def on_fit_start(self, state: State) -> None:
        assert state.optimizer is not None
        self.averaged = state.ema is not None
        self.groups = {g["name"]: g for g in state.optimizer.param_groups}
        norms = [m for m in state.detector.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        self.norms_learn = any(p.requires_grad for m in norms for p in m.parameters())

    def on_step(self, state: State) -> None:
        assert state.batch is not None
        self.rates.append(state.lr)
        self.sizes.append((state.batch.images.shape[2], state.batch.images.shape[3]))
        self.losses = {str(name): float(value.detach()) for name, value in state.losses.items()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("recipes") / "toy", images=8, masks=True)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file with an untrained, narrow detector of a named architecture."""
    folder = tmp_path_factory.mktemp("teachers")

    def file(name: str) -> Path:
        path = folder / f"{name}.pt"
        if not path.exists():
            torch.manual_seed(1)
            section = {"name": name} | narrow_keys(name)
            model = build_detector(section, ["red", "blue"])
            header = {"kind": "student", "version": "0", "student": section, "names": model.names, "imgsz": 64}
            save_checkpoint(header | {"model": model.state_dict()}, path)
        return path

    return file


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes_that_differ())
def test_two_steps(name: str, pictures: Path, teacher_file: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = resolve(recipe=name)
    narrow = {f"student.{key}": value for key, value in narrow_keys(recipe.student.name).items()}
    teachers = [str(teacher_file(model.partition("@")[0])) for model in recipe.teacher.models]
    size: dict[str, Any] = {"train.imgsz": 64}
    if isinstance(recipe.train.imgsz, tuple):  # the short-side rule, on a tenth of the sides
        size = {"train.imgsz": [side // 10 for side in recipe.train.imgsz]}
        size["augment.short_sides"] = [side // 10 for side in recipe.augment.short_sides]
    watch = Watch()
    fit = Trainer(
        recipe=name, teacher=teachers or None, data=str(pictures), epochs=1, batch=4, device="cpu",
        set=narrow | size | FAST, out=tmp_path / "run", callbacks=[watch],
    ).fit()  # fmt: skip
    assert fit.best.is_file()
    assert len(watch.rates) == 2
    assert all(math.isfinite(value) for value in watch.losses.values())
    for method in recipe.kd:
        terms = [value for term, value in watch.losses.items() if term.startswith(f"{method}/")]
        assert sum(value > 0 for value in terms) > len(terms) / 2
    assert bool(recipe.kd) == bool(teachers) == name.startswith(("fgd-", "pgd-"))
    assert watch.averaged == recipe.ema.enabled == ("yolox" in name or name == "small-data")
    if name != "small-data":
        as_the_papers(name, recipe, watch)


def as_the_papers(name: str, recipe: Recipe, watch: Watch) -> None:
    """What the files say reached the optimizer."""
    peak = recipe.optim.lr_per_image * 4
    if "yolox" in name:
        assert watch.rates == [0, pytest.approx(peak / 4)]
        return
    assert watch.rates == [pytest.approx(peak)] * 2  # a tenth of two steps is no warm-up
    assert watch.groups["weights"]["nesterov"] is False
    biases = watch.groups["biases"]
    assert (biases["lr_factor"], biases["weight_decay"]) == ((2.0, 0.0) if name == "fgd-fcos-r101-r50" else (1.0, 1e-4))
    assert watch.norms_learn  # an untrained backbone frozen would learn nothing, so it is not
    assert all(side % 32 == 0 for size in watch.sizes for side in size)


@pytest.mark.parametrize("name", [name for name in cfg_names("recipes") if name != "small-data"])
def test_the_files_say_what_the_papers_say(name: str) -> None:
    recipe = resolve(recipe=name)
    keys = recipe.student.config.model_dump()
    if "yolox" in name:
        assert (recipe.optim.lr_per_image, recipe.optim.weight_decay) == (0.01 / 64, 5e-4)
        assert recipe.optim.clip_norm is None
        return
    two_stages, solo = "-rcnn-" in name, "solo-" in name
    assert (recipe.optim.lr_per_image, recipe.optim.weight_decay) == (0.02 / (16 if two_stages else 32), 1e-4)
    fcos_of_fgd = name == "fgd-fcos-r101-r50"
    unclipped = recipe.train.epochs == 36 or name.startswith(("retinanet", "reppoints"))
    unclipped |= (two_stages or solo) and not name.startswith("fgd-")
    assert recipe.optim.clip_norm == (None if unclipped else 35)
    edge = name.endswith("effnet-lite0")
    assert recipe.train.imgsz == (640 if edge else SIDES.get(name, (800, 1333)))
    as_pgds_teachers = recipe.train.epochs == 36 and not two_stages
    many = [480, 960] if as_pgds_teachers else [640, 800] if fcos_of_fgd else []
    assert recipe.augment.short_sides == many
    assert bool(keys["norm_frozen"]) == (name.startswith("pgd") or as_pgds_teachers or fcos_of_fgd)


@pytest.mark.parametrize(
    ("name", "student", "teacher", "baseline", "distilled"),
    [
        ("fgd-fcos-r101-r50", "fcos-r50", "fcos-r101", "38.5", "42.7"),
        ("fgd-gfl-r101-r50", "gfl-r50", "gfl-r101", "40.2", "43.5"),
        ("fgd-yolox-l-m", "yolox-m", "yolox-l", "45.1", "46.6"),
        ("fgd-retinanet-r101-r50", "retinanet-r50", "retinanet-r101", "37.4", "39.7"),
        ("fgd-retinanet-x101-r50", "retinanet-r50", "retinanet-x101-64x4d", "37.4", "40.7"),
        ("fgd-reppoints-x101-r50", "reppoints-r50", "reppoints-x101-32x4d", "38.6", "42.0"),
        ("fgd-faster-rcnn-r101-r50", "faster-rcnn-r50", "faster-rcnn-r101", "38.4", "40.5"),
        ("fgd-faster-rcnn-x101-r50", "faster-rcnn-r50", "cascade-mask-rcnn-x101-32x4d", "38.4", "42.0"),
        ("fgd-mask-rcnn-x101-r50", "mask-rcnn-r50", "cascade-mask-rcnn-x101-32x4d", "39.2", "42.1"),
        ("fgd-solo-r101-r50", "solo-r50", "solo-r101", "33.1", "36.0"),
        ("fgd-faster-rcnn-cityscapes-r101-r50", "faster-rcnn-r50", "faster-rcnn-r101", "40.2", "43.0"),
        ("pgd-ddod-r101-r50", "ddod-r50", "ddod-r101", "42.0", "45.4"),
        ("pgd-ddod-crowdhuman-r101-r50", "ddod-r50", "ddod-r101", "46.0 MR, 88.0 AP, 79.0 JI", "42.8, 90.0, 80.7"),
        ("pgd-autoassign-r101-r50", "autoassign-r50", "autoassign-r101", "40.6", "43.8"),
        ("pgd-fcos-r101-r50", "fcos-r50", "fcos-r101", "38.2", "42.5"),
        ("pgd-fcos-r101-mobilenetv2", "fcos-mobilenetv2", "fcos-r101", "32.8", "37.3"),
        ("pgd-gfl-r101-r50", "gfl-r50", "gfl-r101", "40.2", "43.8"),
        ("pgd-atss-r101-r50", "atss-r50", "atss-r101", "39.6", "44.2"),
        ("pgd-atss-r101-mobilenetv2", "atss-mobilenetv2", "atss-r101", "33.5", "38.3"),
    ],
)
def test_a_row_names_its_pair_and_its_figures(
    name: str, student: str, teacher: str, baseline: str, distilled: str
) -> None:
    from yoloxkd.assembly.recipes import recipe_file

    recipe = resolve(recipe=name)
    method = name.partition("-")[0]
    assert (recipe.student.name, recipe.teacher.models, list(recipe.kd)) == (student, [f"{teacher}@coco"], [method])
    assert recipe.kd[method].model_dump()["inherit"] == ("yolox" not in name and "-rcnn-x101" not in name)
    first = recipe_file(name).read_text().splitlines()[0]
    assert f"student {baseline}" in first
    assert f"with {method.upper()} {distilled}" in first


@pytest.mark.parametrize(
    ("name", "weights", "epochs", "inherit", "warmup", "clip"),
    [
        ("fgd-fcos-r101-r50", (1.6e-3, 8e-4, 8e-4, 8e-6, 0.8), 24, True, 1 / 3, 35),
        ("fgd-gfl-r101-r50", (1e-3, 5e-4, 5e-4, 5e-6, 0.5), 12, True, 0.001, 35),
        ("fgd-solo-r101-r50", (1e-3, 5e-4, 5e-4, 5e-6, 0.5), 12, True, 0.001, 35),
        ("fgd-faster-rcnn-r101-r50", (5e-5, 2.5e-5, 5e-5, 5e-7, 0.5), 24, True, 0.001, 35),
        ("fgd-mask-rcnn-r101-r50", (5e-5, 2.5e-5, 5e-5, 5e-7, 0.5), 24, True, 0.001, 35),
        ("fgd-mask-rcnn-x101-r50", (5e-5, 2.5e-5, 5e-5, 5e-7, 0.5), 24, False, 0.001, 35),
        ("fgd-faster-rcnn-x101-r50", (5e-5, 2.5e-5, 5e-5, 5e-7, 0.5), 24, False, 0.001, 35),
        ("fgd-retinanet-r101-r50", (1e-3, 5e-4, 5e-4, 5e-6, 0.5), 24, True, 0.001, 35),
        ("fgd-retinanet-x101-r50", (1e-3, 5e-4, 5e-4, 5e-6, 0.5), 24, True, 0.001, 35),
        ("fgd-reppoints-x101-r50", (1.6e-3, 8e-4, 8e-4, 8e-6, 0.5), 24, True, 0.001, 35),
        ("fgd-yolox-l-m", (2e-3, 1e-3, 1e-3, 1e-5, 0.5), 300, False, None, None),
    ],
)
def test_a_row_of_fgd_is_its_released_configuration(
    name: str, weights: tuple[float, ...], epochs: int, inherit: bool, warmup: float | None, clip: float | None
) -> None:
    """Repository yzd-v/FGD, folder configs/distillers/fgd (branch yolox for YOLOX)."""
    recipe = resolve(recipe=name)
    keys = recipe.kd["fgd"].model_dump(by_alias=True)
    assert tuple(keys[key] for key in ("alpha", "beta", "gamma", "lambda", "tau")) == weights
    assert (recipe.train.epochs, keys["inherit"], recipe.optim.clip_norm) == (epochs, inherit, clip)
    images = 64 if "yolox" in name else 16  # of a step
    assert recipe.optim.lr_per_image * images == pytest.approx(0.02 if "-rcnn-" in name else 0.01)
    assert recipe.optim.momentum == 0.9
    if warmup is None:
        assert recipe.optim.nesterov
        assert keys["scale_by_area"]
        return
    assert recipe.schedule.warmup_ratio == pytest.approx(warmup, rel=2e-3)
    assert (recipe.optim.nesterov, recipe.schedule.gamma, recipe.ema.enabled) == (False, 0.1, False)
    assert (recipe.val.conf, recipe.val.max_det) == (0.05, 100)


@pytest.mark.parametrize(("family", "alone"), [("fcos", "38.2, with PGD 39.5"), ("atss", "39.6, with PGD 40.7")])
def test_self_distillation_has_the_row_s_settings_and_its_own_kind_as_teacher(family: str, alone: str) -> None:
    from yoloxkd.assembly.recipes import recipe_file

    itself, bigger = (resolve(recipe=f"pgd-{family}-{teacher}-r50") for teacher in ("r50", "r101"))
    assert (itself.student.name, itself.teacher.models) == (f"{family}-r50", [f"{family}-r50@coco"])
    assert itself.model_dump(exclude={"teacher"}) == bigger.model_dump(exclude={"teacher"})
    first = recipe_file(f"pgd-{family}-r50-r50").read_text().splitlines()[0]
    assert "Table 4" in first
    assert f"student {alone} " in first
