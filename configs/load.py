"""From a TOML file and the command line to a RunConfig: merged as dictionaries, then validated once."""

import difflib
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, TypeVar, Union, get_args

import tyro
from pydantic import ValidationError

from configs.schema import RunConfig
from model.errors import UserError
from model.section import Section, former_names, section_of

T = TypeVar("T")


def from_command_line(argv: Sequence[str] | None, prog: str, description: str) -> RunConfig:
    """`prog [FILE.toml] [--section.key value ...]` -> RunConfig. Exits with tyro's message where the line is wrong."""
    return with_options(argv, prog, description, {})[0]


def with_options(
    argv: Sequence[str] | None, prog: str, description: str, options: dict[str, Any]
) -> tuple[RunConfig, dict[str, Any]]:
    """Like from_command_line, for a program with more options (name -> type); also returns their values."""
    file = tyro.conf.arg(help="TOML config file; without one, every key has its default", help_behavior_hint="")
    fields = {"file": Annotated[Path | None, tyro.conf.Positional, file], **options, **_options(RunConfig)}
    line: Any = _typed_dict("CommandLine", fields)
    given: dict[str, Any] = tyro.cli(
        line, args=_with_current_options(argv, RunConfig), prog=prog, description=description
    )
    own = {name: given.pop(name) for name in options if name in given}
    return load(given.pop("file", None), given), own


def load(file: Path | None, overrides: dict[str, Any] | None = None) -> RunConfig:
    """The config of a file with overrides on top. UserError names the file, the key and the value."""
    overrides = RunConfig.with_current_names(overrides or {})
    content = {} if file is None else {"name": file.stem} | RunConfig.with_current_names(read_toml(file))
    return build(RunConfig, merge(content, overrides), source=_source(file, overrides))


def read_toml(file: Path) -> dict[str, Any]:
    """The content of a TOML file. UserError if it is missing, with the nearest name, or not TOML."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(str(file), [str(p) for p in file.parent.glob("*.toml")], n=1)
        raise UserError(f"{file} does not exist" + (f"; did you mean {near[0]}?" if near else "")) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as TOML: {error}") from None


def build(schema: type[T], values: dict[str, Any], *, source: Callable[[tuple], str] = lambda key: "") -> T:
    """schema(**values). UserError describes the first error on one line; `source` gives the origin of a key."""
    try:
        return schema(**values)
    except ValidationError as error:
        first, *more = error.errors()
        key = _known(schema, first["loc"])
        also = f" (and {len(more)} more)" if more and more[0]["loc"][: len(key)] != first["loc"][: len(key)] else ""
        raise UserError(source(key) + _explain(schema, key, first) + also) from None


def _known(schema: type, loc: tuple) -> tuple[str, ...]:
    """The keys in the location of an error, without pydantic's own words after the first value or unknown key."""
    key: list[str] = []
    section = schema if issubclass(schema, Section) else None
    for part in loc:
        if section is None:
            break
        key.append(str(part))
        section = section_of(section, str(part))
    return tuple(key)


def _explain(schema: type, key: tuple[str, ...], error: Any) -> str:
    name = ".".join(key)
    if error["type"] == "extra_forbidden":
        known = list(_section_at(schema, key[:-1]).model_fields)
        near = difflib.get_close_matches(key[-1], known, n=1)
        return f"{name} is unknown; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
    if error["type"] == "missing" and len(error["loc"]) == len(key):  # the key, not a part of its value
        return f"{name} is missing: write it"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{name}: {message}" if key else message
    value = error["input"]
    if isinstance(value, dict) and error["type"].endswith("_type") and key:
        return f"{name} ({value}) is a section here, and should be a value: {error['msg'].lower()}"
    return f"{name} ({value!r}): {error['msg'][0].lower()}{error['msg'][1:]}"


def _section_at(schema: type, key: tuple[str, ...]) -> type[Section]:
    for part in key:
        nested = section_of(schema, part)
        assert nested is not None, f"{part} is not a section of {schema}"
        schema = nested
    return schema


def _source(file: Path | None, overrides: dict[str, Any]) -> Callable[[tuple], str]:
    """The origin of a key: the command line if it is among the overrides, else the file."""

    def source(key: tuple[str, ...]) -> str:
        at: Any = overrides
        for part in key:
            at = at.get(part, None) if isinstance(at, dict) else None
        on_line = at not in (None, {}) if key else not file
        return "" if on_line or file is None else f"{file}: "

    return source


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """The values of `below`, replaced by those of `above` key by key in every section; empty sections are ignored."""
    merged = dict(below)
    for key, value in above.items():
        if value == {} and key in merged:
            continue
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return merged


def _with_current_options(argv: Sequence[str] | None, schema: type[Section]) -> list[str]:
    """The command line with former names of options replaced, `--section.no-key` and `--section.key=value` too."""
    current = {}
    for (*path, old), new in former_names(schema):
        for no in ("", "no_"):
            current["--" + ".".join((*path, no + old))] = "--" + ".".join((*path, no + new))
    line = []
    for argument in sys.argv[1:] if argv is None else argv:
        option, equals, value = argument.partition("=")
        line.append(current.get("--" + option[2:].replace("-", "_"), option) + equals + value)
    return line


def _options(schema: type[Section]) -> dict[str, Any]:
    """The schema as optional command-line arguments; absent ones leave the value of the file unchanged."""
    options: dict[str, Any] = {}
    for key, field in schema.model_fields.items():
        if nested := section_of(schema, key):
            options[key] = _typed_dict(key, _options(nested))
            continue
        kind: Any = field.annotation
        if type(None) in get_args(kind):
            kind = Union[(Literal["none"], *(t for t in get_args(kind) if t is not type(None)))]
        default = "none" if field.default is None else field.default
        help = f"{field.description} (default: {default})"
        options[key] = Annotated[kind, tyro.conf.arg(help=help, help_behavior_hint="")]
    return options


def _typed_dict(name: str, fields: dict[str, Any]) -> Any:
    return TypedDict(name, fields, total=False)  # type: ignore[operator]
