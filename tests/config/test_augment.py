"""The augment section refuses what it cannot mean."""

from __future__ import annotations

import pytest

from yoloxkd.config.augment import Augment
from yoloxkd.config.load import validate
from yoloxkd.errors import UserError


def test_defaults_are_those_of_yolox() -> None:
    section = Augment()
    assert (section.mosaic, section.mixup, section.degrees, section.shear) == (1.0, 0.0, 10.0, 2.0)
    assert (section.scale, section.translate, section.hsv, section.flip) == ((0.1, 2.0), 0.1, (5, 30, 30), 0.5)


@pytest.mark.parametrize(
    "keys",
    [
        {"mosaic": 1.5},
        {"mosaic": 0.0, "mixup": 0.5},
        {"scale": [2.0, 0.5]},
        {"scale": [0, 1]},
        {"mixup_scale": [0.5]},
        {"hsv": [76, 0, 0]},
        {"shear": 45},
        {"flip": -0.1},
        {"mosiac": 1.0},
    ],
)
def test_values_out_of_range_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(UserError):
        validate(Augment, keys, "augment section")


def test_every_key_is_described() -> None:
    assert all(field.description for field in Augment.model_fields.values())
