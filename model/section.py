"""Section: a frozen, validated part of a config. Every config class of Sash derives from it."""

from typing import ClassVar, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A frozen part of a config: unknown keys are refused, and "none" stands for None, which TOML cannot say."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    renamed: ClassVar[dict[str, str]] = {}  # old key -> new key: old files go on being read, new ones have the new key

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values  # refused by pydantic: not a section
        values = dict(values)
        for old, new in cls.renamed.items():
            if old in values:
                if new in values:
                    raise ValueError(f"{old} is the old name of {new}, and both are given: keep {new}")
                values[new] = values.pop(old)
        for key, field in cls.model_fields.items():
            if isinstance(values.get(key), bool) and field.annotation is not bool:
                raise ValueError(f"{key} ({values[key]}) takes a value, not true or false")
        optional = {key for key, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        return {key: None if value == "none" and key in optional else value for key, value in values.items()}
