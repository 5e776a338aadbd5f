"""Options of a program: declared once as a pydantic model, parsed by tyro, refused in one line.

    @options_class
    class Options:
        rounds: Count = 3
        \"\"\"timed rounds; the median is reported\"\"\"

The text below a field is its help and its constraints are its range; nothing else declares either.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union, dataclass_transform, get_args, get_origin

import tyro
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from tyro.constructors import MISSING, ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from model.errors import UserError

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]

T = TypeVar("T")
Command = tuple[Callable[[Any], None], type]  # a function, and the class of its options

ALLOWED = {  # by pydantic's name of an error
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "too_short": "must have at least {min_length} values",
}


@dataclass_transform(kw_only_default=True, frozen_default=True)
def options_class(cls: type[T]) -> type[T]:
    """Make a class the options of a program: a frozen pydantic dataclass. A group of them is a field of such a type."""
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    return dataclass(cls, frozen=True, slots=True, kw_only=True, config=config)  # type: ignore[return-value]


def parse(options: type[T], *, prog: str, description: str | None, argv: Sequence[str] | None = None) -> T:
    """Read the command line. UserError for a value out of its range; tyro itself reports what it cannot read."""
    return _cli(options, prog, description, argv)


def run_subcommand(
    commands: Mapping[str, Command],
    *,
    prog: str,
    description: str | None,
    argv: Sequence[str] | None = None,
) -> None:
    """Read `prog COMMAND [options]` and call the command's function, whose docstring is its help."""
    kinds = [
        Annotated[options, tyro.conf.subcommand(name, description=function.__doc__)]
        for name, (function, options) in commands.items()
    ]
    chosen = _cli(Union[tuple(kinds)], prog, description, argv)  # noqa: UP007
    next(function for function, options in commands.values() if type(chosen) is options)(chosen)


def as_arguments(options: type) -> dict[str, Any]:
    """Types of arguments by name, for a command line that a config shares and that leaves out what is not given."""
    arguments = {}
    for name, field in options.__pydantic_fields__.items():  # type: ignore[attr-defined]
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        help = (_help(options, name) or "") + ("" if default is None else f" (default: {default})")
        kind = field.annotation
        if type(None) in get_args(kind):  # None is the default, which is said by leaving the option out
            kind = Union[tuple(_without_none(field))]  # noqa: UP007
        arguments[name] = Annotated[kind, tyro.conf.arg(help=help, help_behavior_hint="")]
    return arguments


def validated(options: type[T], given: Mapping[str, Any]) -> T:
    """options(**given). UserError that names the option as typed, shows the value and says what is allowed."""
    try:
        return options(**given)
    except ValidationError as error:
        raise UserError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """The first thing wrong in one line, such as `--rounds (0) must be at least 1`."""
    first = error.errors()[0]
    context = {key: _plain(x) for key, x in first.get("ctx", {}).items()}
    if "error" in context:  # a validator's own words
        said = str(context["error"])
    else:
        said = ALLOWED.get(first["type"], "").format(**context) or first["msg"][0].lower() + first["msg"][1:]
    if not first["loc"]:
        return said
    value = first["input"]
    shown = " ".join(map(str, value)) if isinstance(value, tuple | list) else "''" if value == "" else value
    return f"--{str(first['loc'][0]).replace('_', '-')} ({shown}) {said}"


def _plain(x: object) -> object:
    return int(x) if isinstance(x, float) and x.is_integer() else x


class _InvalidError(Exception):
    """What explain() says, past tyro, which would print a ValueError in its own way."""


def _cli(options: Any, prog: str, description: str | None, argv: Sequence[str] | None) -> Any:
    omit = (tyro.conf.OmitArgPrefixes,)  # a group's name is its title in the help, and no part of its options' names
    try:
        return tyro.cli(options, args=argv, prog=prog, description=description, config=omit, registry=_registry())
    except _InvalidError as error:
        raise UserError(str(error)) from None


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()

    @registry.struct_rule
    def pydantic_model(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not hasattr(info.type, "__pydantic_fields__"):
            return None

        def instantiate(**given: Any) -> object:
            try:
                return info.type(**given)
            except ValidationError as error:
                raise _InvalidError(explain(error)) from None

        return StructConstructorSpec(instantiate=instantiate, fields=tuple(_fields(info.type, info.default)))

    return registry


def _fields(options: type, defaults: Any) -> Iterator[StructFieldSpec]:
    for name, field in options.__pydantic_fields__.items():  # type: ignore[attr-defined]
        default = MISSING if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(defaults, options):
            default = getattr(defaults, name)
        help = _help(options, name)
        kind = _type(field)
        if default is None and "(default: " in (help or ""):  # the text says what None stands for
            kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
        yield StructFieldSpec(name=name, type=kind, default=default, helptext=help)


def _type(field: FieldInfo) -> Any:
    """The annotation as it was written, with what stood beside it for tyro."""
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    if len(kinds := _without_none(field)) == 1 and type(None) in get_args(field.annotation):
        plain = get_args(kinds[0])[0] if get_origin(kinds[0]) is Annotated else kinds[0]
        if isinstance(plain, type):  # rather than "{None}|INT"
            return Annotated[kind, tyro.conf.arg(metavar=plain.__name__.upper())]
    return kind


def _without_none(field: FieldInfo) -> list[Any]:
    return [kind for kind in get_args(field.annotation) if kind is not type(None)]


def _help(options: type, name: str) -> str | None:
    """The text below the field, where it was declared first; of a group, its docstring."""
    declared = [cls.__dict__.get("__pydantic_fields__", {}).get(name) for cls in options.__mro__]
    texts = [field.description for field in declared if field is not None and field.description]
    kind = options.__pydantic_fields__[name].annotation  # type: ignore[attr-defined]
    if not texts and hasattr(kind, "__pydantic_fields__"):
        texts = [kind.__doc__]
    return " ".join(texts[0].split()) if texts else None
