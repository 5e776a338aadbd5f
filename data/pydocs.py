"""pydocs: the documentation that ships with every Python, as one text. Sources are parsed, never imported.

It has two parts with one layout (a starred heading, a signature, a description indented by three spaces): the language
reference from `pydoc_data/topics.py`, and the docstrings of the standard library, one document per module.
"""

import ast
import hashlib
import inspect
import platform
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from model.errors import UserError

# Skipped because they do not read as documentation: tests, generated tables, and installed packages.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}
_SKIPPED_FILES = re.compile(r"_sysconfig.*|_sitebuiltins.*|sitecustomize\.py|.*_data\.py")
_SHORTEST = 200  # characters; modules with less text are left out

_Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents() -> Iterator[str]:
    """Yield the documents in a fixed pseudo-random order, by the hash of their names."""
    yield from _documents()


@cache
def _documents() -> list[str]:
    texts = _topics() | _modules()
    return [texts[name] for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())]


def identity() -> str:
    """Everything that the text depends on: Python's version, and the names and sizes of the source files."""
    files = [f"{path.relative_to(_library()).as_posix()} {path.stat().st_size}" for path in _sources()]
    return "\n".join([platform.python_version(), *files])


@cache
def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _sources() -> list[Path]:
    """List the standard library's source files in the order of their names."""
    root = _library()
    found = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts) and not _SKIPPED_FILES.fullmatch(path.name)
    ]
    if not found:
        raise UserError(
            f"pydocs: this Python has no standard library sources in {root}; use another Python or your own text"
        )
    return found


def _topics() -> dict[str, str]:
    """Read the language reference, dropping topics that mostly repeat a longer one."""
    path = _library() / "pydoc_data" / "topics.py"
    if not path.exists():
        return {}
    tables = [node.value for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    topics: dict[str, str] = ast.literal_eval(next(table for table in tables if isinstance(table, ast.Dict)))
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {part for part in topics[name].split("\n\n") if len(part) > 40}
        if len(paragraphs & seen) * 2 <= len(paragraphs):
            kept[f"topic {name}"] = _tidy(topics[name])
            seen |= paragraphs
    return kept


def _modules() -> dict[str, str]:
    """Write one document for each module with enough documentation."""
    texts = {}
    for path in _sources():
        name = ".".join(path.relative_to(_library()).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_bytes())
        heading = f'The "{name}" module'
        parts = [f"{heading}\n{'*' * len(heading)}", ast.get_docstring(tree) or "", *_entries(tree, prefix="")]
        text = _tidy("\n\n".join(part for part in parts if part))
        if len(text) >= _SHORTEST:
            texts[f"module {name}"] = text
    return texts


def _entries(parent: ast.AST, *, prefix: str) -> Iterator[str]:
    """Yield a signature with its description for each documented class, function and method, in source order."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, _Documented):
            doc = ast.get_docstring(node)
            if doc:
                yield f"{_signature(node, prefix)}\n\n{_indent(doc)}"
            if isinstance(node, ast.ClassDef):
                yield from _entries(node, prefix=f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _entries(node, prefix=prefix)


def _signature(node: _Documented, prefix: str) -> str:
    """Write `class Name(arguments)` or `Class.name(arguments)`, without self."""
    name = prefix + node.name
    if isinstance(node, ast.ClassDef):
        made_by = (child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__")
        maker = next(made_by, None)
        return f"class {name}" + (f"({_arguments(maker.args, method=True)})" if maker else "")
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if "property" in decorators:
        return name
    word = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{word}{name}({_arguments(node.args, method=bool(prefix) and 'staticmethod' not in decorators)})"


def _arguments(arguments: ast.arguments, *, method: bool) -> str:
    """Write the arguments without annotations, and without the first one of a method."""
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument:
            argument.annotation = None
    text = ast.unparse(arguments)
    return re.sub(r"^\w+(, /)?(, |$)", "", text) if method else text


def _indent(text: str) -> str:
    return "\n".join(f"   {line}" if line.strip() else "" for line in inspect.cleandoc(text).split("\n"))


def _tidy(text: str) -> str:
    """Drop trailing blanks and repeated empty lines; end with a single newline."""
    lines = "\n".join(line.rstrip() for line in text.expandtabs().splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n") + "\n"
