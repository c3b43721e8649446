"""The base of every section of a run: frozen, closed, and strict about true and false. In: what YAML holds. Out: validated values."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1, YAML takes yes for true: neither is what was meant."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if not isinstance(value, bool) or annotation is bool or bool in getattr(annotation, "__args__", ()):
            return value
        if {"yes", "no"} <= set(getattr(annotation, "__args__", ())):
            return "yes" if value else "no"
        raise ValueError("true and false are not allowed here")
