"""Base class of typed sections: unknown keys and absurd numbers are refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from yoloxkd.config.renamed import OLD_FIELDS

MOST_FLOAT, MOST_INT = 1e12, 2**63 - 1
"""No setting is larger, whatever its own limits are; the second is the largest seed that torch takes."""


class Strict(BaseModel):
    """A pydantic model that refuses unknown keys, NaN, infinity, yes and no for a number, and checks its defaults."""

    model_config = ConfigDict(extra="forbid", validate_default=True, populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _old_spelling(cls, value: Any) -> Any:
        """Read the fields of sections that an earlier version wrote."""
        if not isinstance(value, dict) or not any(old in value and old not in cls.model_fields for old in OLD_FIELDS):
            return value
        fields = cls.model_fields
        return {OLD_FIELDS[k] if OLD_FIELDS.get(k) in fields and k not in fields else k: v for k, v in value.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if any(isinstance(item, bool) for item in _items(value)) and not _takes_flags(cls, str(info.field_name)):
            raise ValueError("should not be true or false (in YAML yes, no, on and off mean these; quote a text)")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _no_absurd_number(cls, value: Any) -> Any:
        for item in _items(value):
            if isinstance(item, int | float) and abs(item) > (MOST_INT if isinstance(item, int) else MOST_FLOAT):
                raise ValueError("is larger than any setting can be")
        return value


def _items(value: Any) -> Iterator[Any]:
    """A value, or those in a list and the lists in it."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _items(item)
    else:
        yield value


@functools.cache
def _takes_flags(model: type[BaseModel], name: str) -> bool:
    """Whether a field may hold True or False somewhere."""

    def within(kind: Any) -> bool:
        return kind in (bool, Any, object) or any(within(part) for part in get_args(kind) if not isinstance(part, str))

    return within(model.model_fields[name].annotation)
