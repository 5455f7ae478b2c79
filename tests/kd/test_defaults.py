"""The shipped defaults are valid keys, and hold the numbers of the published recipes."""

from __future__ import annotations

import inspect

import pytest
import yaml

from yoloxkd.config.files import cfg_folder
from yoloxkd.config.recipe import TeacherSection
from yoloxkd.errors import UserError
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.defaults import kd_defaults, kd_file, kd_sets
from yoloxkd.kd.distillation import Distill
from yoloxkd.kd.methods.fgd import FGDConfig
from yoloxkd.kd.methods.pgd import PGDConfig

FAMILIES = ("yolox", "fcos", "gfl", "atss", "retinanet", "autoassign", "ddod", "reppoints", "some-new-family")


NAMES = (*DISTILLERS, *(f"{method}@{chosen}" for method in DISTILLERS for chosen in kd_sets(method)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_keys_of_the_method(name: str, family: str) -> None:
    method = name.partition("@")[0]
    config = DISTILLERS[method].Config.model_validate(kd_defaults(name, family))
    assert type(config) is DISTILLERS[method].Config


def test_fgd_weights() -> None:
    def weights(family: str) -> tuple[float, ...]:
        c = FGDConfig.model_validate(kd_defaults("fgd", family))
        return c.tau, c.alpha, c.beta, c.gamma, c.lambda_

    assert weights("yolox") == (0.5, 2e-3, 1e-3, 1e-3, 1e-5)
    assert weights("fcos") == (0.8, 1.6e-3, 8e-4, 8e-4, 8e-6)
    assert weights("retinanet") == (0.5, 1e-3, 5e-4, 5e-4, 5e-6)
    assert weights("reppoints") == (0.5, 1.6e-3, 8e-4, 8e-4, 8e-6)
    assert weights("gfl") == (0.5, 1e-3, 5e-4, 5e-4, 5e-6)


def test_pgd_feature_weights_are_four_times_the_released_ones() -> None:
    released = {"yolox": 0.04, "fcos": 0.04, "gfl": 0.04, "atss": 0.08, "autoassign": 0.08, "ddod": 0.08}
    for family, alpha in released.items():
        c = PGDConfig.model_validate(kd_defaults("pgd", family))
        assert c.alpha == pytest.approx(4 * alpha)
        assert c.gamma == pytest.approx(1.6 * alpha)
        assert c.tau == (0.4 if family == "autoassign" else 0.8)
        assert (c.delta, c.k, c.xi_cls, c.xi_reg) == (8e-4, 30, 0.8, 0.6)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_says_where_it_comes_from(name: str) -> None:
    text = (cfg_folder() / "kd" / f"{name}.yaml").read_text()
    for line in text.splitlines():
        value = yaml.safe_load(line)
        if isinstance(value, dict) and all(v is not None and not isinstance(v, dict) for v in value.values()):
            assert "#" in line, line


def test_lambda_is_the_key_that_users_type() -> None:
    assert FGDConfig.model_validate({"lambda": 3e-6}).lambda_ == 3e-6
    assert FGDConfig().model_dump(by_alias=True)["lambda"] == 5e-6


@pytest.mark.parametrize("method", DISTILLERS)
def test_a_config_made_in_python_has_the_numbers_of_the_command_line(method: str) -> None:
    """A family that nothing was published for gets the method's own, from one source."""
    made, typed = DISTILLERS[method].Config(), DISTILLERS[method].Config.model_validate(kd_defaults(method, "new"))
    assert made == typed
    given = kd_file(method)["default"]
    assert {key: made.model_dump(by_alias=True)[key] for key in given} == given
    next(iter(value.clear() for value in vars(made).values() if isinstance(value, list)), None)
    assert DISTILLERS[method].Config() == typed, "one config's list is another's"


def test_a_teacher_is_checked_in_python_as_on_the_command_line() -> None:
    parameters = inspect.signature(Distill).parameters
    section = TeacherSection()
    assert (parameters["min_ap"].default, parameters["gate_images"].default) == (section.min_ap, section.gate_images)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fdg", "unknown distiller 'fdg'; did you mean 'fgd'"),
        ("pgdd", "unknown distiller 'pgdd'; did you mean 'pgd'"),
        ("none", "unknown distiller 'none'; known: chen, crosskd, cwd, defeat, fgd, fgfi, .*pgd, pkd, .*tadf$"),
        ("pgd@smal-data", "unknown set of defaults 'pgd@smal-data'; did you mean 'pgd@small-data'"),
        ("pgd@", "unknown set of defaults 'pgd@'"),
        ("mgd@small-data", "unknown set of defaults 'mgd@small-data'; mgd has one set only: write mgd"),
        ("cwd@yolox", "unknown set of defaults 'cwd@yolox'; did you mean 'cwd@yolo'"),
    ],
)
def test_unknown_names_are_answered(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        kd_defaults(name, "yolox")
