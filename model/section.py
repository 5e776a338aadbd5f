"""Section: the base of every part of a config, strict about keys and tolerant of their former names."""

from collections.abc import Iterator
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A frozen part of a config: unknown keys are refused, "none" stands for None, which TOML has no word for."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    renamed: ClassVar[dict[str, str]] = {}  # former name of a key -> its name; former names are read, never written

    @classmethod
    def with_current_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values with former names of keys replaced, in nested sections too; a key given by both names stays."""
        current: dict[str, Any] = {}
        for key, value in values.items():
            name = cls.renamed.get(key, key)
            name = key if name in values else name
            nested = section_of(cls, name)
            current[name] = nested.with_current_names(value) if nested and isinstance(value, dict) else value
        return current

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values  # pydantic refuses it: not a section
        for old, new in cls.renamed.items():
            if old in values and new in values:
                raise ValueError(f"{old} is the former name of {new}, and both are given: remove {old}")
        values = {cls.renamed.get(key, key): value for key, value in values.items()}
        for key, field in cls.model_fields.items():
            if isinstance(values.get(key), bool) and field.annotation is not bool:
                raise ValueError(f"{key} ({values[key]}) takes a value, not true or false")
        optional = {key for key, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        return {key: None if value == "none" and key in optional else value for key, value in values.items()}


def section_of(section: type[Section], key: str) -> type[Section] | None:
    """The class of the section nested under this key; None if the key is a value or unknown."""
    field = section.model_fields.get(key)
    kind = field.annotation if field else None
    return next((t for t in (kind, *get_args(kind)) if isinstance(t, type) and issubclass(t, Section)), None)


def former_names(section: type[Section], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each key that was renamed, as the path of its former name, and its name, in nested sections too."""
    for old, new in section.renamed.items():
        yield (*prefix, old), new
    for key in section.model_fields:
        if nested := section_of(section, key):
            yield from former_names(nested, (*prefix, key))
