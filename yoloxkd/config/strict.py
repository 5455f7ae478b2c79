"""The base of every typed section: unknown keys are refused, never swallowed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A pydantic model that refuses unknown keys and checks its defaults."""

    model_config = ConfigDict(extra="forbid", validate_default=True, populate_by_name=True)
