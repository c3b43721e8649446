"""The base of all sections of a run's settings."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from smolray.config.errors import ConfigError, explain


class Section(BaseModel):
    """Frozen, checked, no unknown keys. The docstring below a setting is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def replace(self, settings: Mapping[str, Any]) -> Self:
        """A copy with other values for some dotted keys, such as `{"engine.stage": 3, "lora": None}`.

        Each value is checked against its type and limits; `check_run` checks how they go together. A section that is
        null, such as `lora`, is created when one of its keys is set. Raises ConfigError.
        """
        record: dict[str, Any] = dict(self)
        for key, value in settings.items():
            *parents, last = key.split(".")
            section = record
            for name in parents:
                below = section.get(name)
                section[name] = dict(below) if isinstance(below, BaseModel | dict) else {}
                section = section[name]
            section[last] = value

        try:
            return self.model_validate(record)
        except ValidationError as error:
            raise ConfigError(explain(type(self), error)) from None

    @field_validator("*", mode="after")
    @classmethod
    def _numbers_fit(cls, value: Any) -> Any:
        """Refuse whole numbers that no file format and no library takes."""
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, int) and abs(part) >= 2**63 for part in parts):
            raise ValueError("expected a number below 2^63")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true for a number (Python takes it for 1), and read YAML's true as `yes` where that is a choice."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if not isinstance(value, bool) or annotation is bool or bool in getattr(annotation, "__args__", ()):
            return value
        if {"yes", "no"} <= set(getattr(annotation, "__args__", ())):
            return "yes" if value else "no"
        raise ValueError("true and false are not allowed here")
