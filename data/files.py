"""Your own text: a .txt, .md, .jsonl or .parquet file, or a folder of such files."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from data.text import Piece, Text, encodable
from model.errors import UserError

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
PIECE_CHARS = 1 << 20  # a plain file is read in pieces of about this many characters


def open_files(path: Path) -> Text:
    """Describe the text of a file, or of all files of a folder in order of their names; nothing is read yet."""
    files = _list_files(path)
    stats = [(file, file.stat()) for file in files]
    return Text(
        name=path.resolve().stem if path.is_file() else path.resolve().name,
        origin=f"{path.resolve()} ({len(files)} files)" if path.is_dir() else str(path.resolve()),
        identity="\n".join(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats),
        splits={"train": lambda: (piece for file in files for piece in read_file(file))},
        approx_bytes={"train": sum(stat.st_size for _, stat in stats)},
    )


def _list_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"{path}: only {', '.join(SUFFIXES)} files can be read; rename it to .txt if it is plain text"
            )
        return [path]
    inside = sorted((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.relative_to(path).parts)
    files = [
        file
        for file in inside
        if file.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise UserError(f"{path}: the folder has {len(inside)} files, but no {', '.join(SUFFIXES)} file")
    return files


def read_file(path: Path) -> Iterator[Piece]:
    """Yield a file's pieces: plain text is one document; each line of a .jsonl or row of a .parquet file is one."""
    match path.suffix.lower():
        case ".jsonl":
            return _read_jsonl(path)
        case ".parquet":
            return _read_parquet(path)
    return _read_plain(path)


def _read_plain(path: Path) -> Iterator[Piece]:
    """Read piece by piece, cut at line ends, so that large files need little memory; all line ends become \\n."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            piece = file.read(PIECE_CHARS) + file.readline(PIECE_CHARS)
            while piece:
                following = file.read(PIECE_CHARS) + file.readline(PIECE_CHARS)
                yield Piece(piece, ends_document=not following)
                piece = following
        except UnicodeDecodeError:
            raise _not_utf8(path) from None


def _read_jsonl(path: Path) -> Iterator[Piece]:
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield from _text_of_line(line, f"{path}:{number}")
        except UnicodeDecodeError:
            raise _not_utf8(path) from None


def _text_of_line(line: str, where: str) -> Iterator[Piece]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: invalid JSON ({error}); each line must be an object with a 'text' key") from None
    if not isinstance(record, dict) or "text" not in record:
        has = f"columns {', '.join(map(repr, record))}" if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: no column 'text', it has {has}; rename the column with the text to 'text'")
    text = record["text"]
    if not isinstance(text, str | None):
        raise UserError(f"{where}: 'text' is {text!r:.40}; it must be a string")
    if text:
        yield Piece(encodable(text))


def _read_parquet(path: Path) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: damaged parquet file ({str(error).splitlines()[0]}); copy it again") from None
    with file:
        schema = file.schema_arrow
        if "text" not in schema.names:
            columns = ", ".join(map(repr, schema.names))
            raise UserError(f"{path}: no column 'text', it has columns {columns}; rename the column with the text")
        if not (pa.types.is_string(schema.field("text").type) or pa.types.is_large_string(schema.field("text").type)):
            raise UserError(f"{path}: column 'text' has type {schema.field('text').type}; it must hold strings")
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            yield from (Piece(text) for text in batch.column("text").to_pylist() if text)


def _not_utf8(path: Path) -> UserError:
    """An error that names the first byte that is not UTF-8 and the command that converts the file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    seen = offset = 0
    with open(path, "rb") as file:
        encoding = "UTF-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "LATIN1"
        file.seek(0)
        block = b"first"
        while block:
            block = file.read(PIECE_CHARS)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = seen - (len(error.object) - len(block)) + error.start  # the decoder buffers partial characters
                break
            seen += len(block)
    return UserError(
        f"{path}: the byte at offset {offset} is not UTF-8; convert the file, for example with "
        f"`iconv -f {encoding} -t UTF-8 {path.name} > {path.stem}-utf8{path.suffix}`"
    )
