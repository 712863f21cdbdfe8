"""The rows of a file one after the other, a bad one with the reason why, so that it does not stop the others."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from openbook.config import Format, UsageError
from openbook.data.sources import BUFFER, BYTE_ORDER_MARK, ROWS_AT_ONCE, SUFFIXES, Row

LONGEST_LINE = 1 << 24  # bytes of a line, or characters of a field: what is longer is no row
SHOWN = 2000  # characters kept of a row that could not be read
DELIMITERS = {"csv": ",", "tsv": "\t"}
AS_JSON = {b"encoded": b"json"}  # of a column whose values are of several kinds, or nested
EXACT_IN_FLOAT, INT64 = 1 << 53, 1 << 63
STRANGE = "it holds bytes that are not UTF-8, or a line above 16 MB"


@dataclass(frozen=True)
class Record:
    """A row as it was found. It is to be used if there is no `reason` against it."""

    number: int  # of the row in its file, from 1; the header is none
    values: Row
    reason: str = ""
    raw: str = ""  # of a row that could not be read: its beginning
    origin: tuple[pa.RecordBatch, int] | None = None  # where Arrow holds it, of Parquet


def row_format(path: Path, option: str) -> Format:
    """What the suffix of a file of rows says. Raises UsageError, naming the option, for any other file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    suffix = suffixes[-2:-1] if zipped else suffixes[-1:]
    found = SUFFIXES.get(suffix[0]) if suffix else None
    may_be_zipped = option == "--input" and found != "parquet"
    if found not in ("csv", "tsv", "jsonl", "parquet") or (zipped and not may_be_zipped):
        raise UsageError(
            f"{option} {path}: its suffix is none of .csv, .tsv, .jsonl and .parquet"
            f"{' (but for the last, .gz may follow)' if option == '--input' else ''}; convert or rename it"
        )
    return found


class RecordFile:
    """A file of rows that is read from the start as often as asked, and never held whole.

    `columns` are those of the header or schema; of JSON lines, all keys in the order they turn up in. `schema` says
    what they hold in Arrow's terms.
    """

    def __init__(self, path: Path, quoting: bool = True):
        """Raises UsageError for a file without a known suffix or a usable header. JSON lines are read through once."""
        if not path.is_file():
            raise UsageError(f"--input {path}: there is no such file")
        self.path, self.format, self.quoting = path, row_format(path, "--input"), quoting
        self.share: Callable[[], float] = lambda: 0.0  # read so far, of the pass under way
        if self.format == "parquet":
            self.schema = without_dictionaries(self._parquet().schema_arrow)
        elif self.format == "jsonl":
            self.schema = survey(self)
        else:
            self.schema = pa.schema([(name, pa.string()) for name in self._header()])
        self.columns = tuple(self.schema.names)
        repeated = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if repeated:
            raise UsageError(f"--input {path} names the column {repeated[0]!r} twice; rename one of them")

    def __iter__(self) -> Iterator[Record]:
        """All rows. Raises UsageError for what no row can be told apart in, such as half a gzip file."""
        readers = {"parquet": self._batches, "jsonl": self._json_lines}
        try:
            yield from readers.get(self.format, self._separated)()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UsageError(f"--input {self.path} is no complete gzip file ({error}); fetch it again") from error
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"--input {self.path} cannot be read to its end ({error}); fetch it again") from error

    def _header(self) -> list[str]:
        with ExitStack() as files:
            try:
                header: list[str] = next(self._reader(self._lines(files)), [])
            except (csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise UsageError(f"--input {self.path}: its header cannot be read ({error}); mend it") from error
        if not header or any(map(is_strange, header)):
            raise UsageError(f"--input {self.path}: its first line names no columns; put their names there, in UTF-8")
        return header

    def _reader(self, lines: Iterator[bytes]) -> Any:  # of the csv module, which has no name for it
        csv.field_size_limit(LONGEST_LINE)
        texts = (line.decode("utf-8", "surrogateescape") for line in lines)  # strange bytes are met again in a field
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if self.quoting else csv.QUOTE_NONE
        return csv.reader(texts, delimiter=DELIMITERS[self.format], quoting=quoting, strict=True)

    def _separated(self) -> Iterator[Record]:
        with ExitStack() as files:
            reader = self._reader(self._lines(files))
            number = 0
            header: list[str] = next(reader, [])
            while True:
                first = reader.line_num + 1
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    number += 1
                    yield Record(number, {}, f"lines {first} to {reader.line_num}: {error}")
                    continue
                if not fields:
                    continue
                number += 1
                yield _of_fields(number, header, fields)

    def _json_lines(self) -> Iterator[Record]:
        with ExitStack() as files:
            lines = (line for line in self._lines(files) if line.strip())
            for number, line in enumerate(lines, start=1):
                yield _of_json(number, line)

    def _batches(self) -> Iterator[Record]:
        number = 0
        with self._parquet() as file:
            total = max(1, file.metadata.num_rows)
            self.share = lambda: _ratio(number, total)
            for batch in file.iter_batches(ROWS_AT_ONCE):
                batch = batch.cast(self.schema)
                for place, (values, reason) in enumerate(values_of(plain(batch))):
                    number += 1
                    yield Record(number, values, reason, origin=(batch, place))

    def _parquet(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path, buffer_size=BUFFER, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"--input {self.path} is not a readable Parquet file ({error})") from error

    def _lines(self, files: ExitStack) -> Iterator[bytes]:
        """Bounded lines; the rest of a longer one is left out, and a byte that is not UTF-8 marks the place."""
        file = files.enter_context(self.path.open("rb"))
        size = max(1, self.path.stat().st_size)
        self.share = lambda: _ratio(file.tell(), size) if not file.closed else 1.0
        stream: Any = files.enter_context(gzip.GzipFile(fileobj=file)) if self.path.suffix.lower() == ".gz" else file
        mark = BYTE_ORDER_MARK.encode()
        while line := stream.readline(LONGEST_LINE):
            yield _whole(line, stream).removeprefix(mark)
            mark = b""


def survey(records: RecordFile) -> pa.Schema:
    """The keys of JSON lines in the order they turn up in, and a type that holds all values of each."""
    kinds: dict[str, set[str]] = {}
    for record in records:
        for name, value in record.values.items():
            kinds.setdefault(name, set()).add(kind_of(value))
    return pa.schema([field_of(name, found - {"null"}) for name, found in kinds.items()])


def kind_of(value: Any) -> str:
    if value is None or isinstance(value, bool | str | float):
        return "null" if value is None else type(value).__name__
    if not isinstance(value, int) or not -INT64 <= value < INT64:
        return "json"
    return "int" if abs(value) <= EXACT_IN_FLOAT else "large"


def field_of(name: str, kinds: set[str]) -> pa.Field:
    for known, type_ in (
        ({"str"}, pa.string()),
        ({"bool"}, pa.bool_()),
        ({"int", "large"}, pa.int64()),
        ({"int", "float"}, pa.float64()),
    ):
        if kinds <= known:
            return pa.field(name, type_)
    return pa.field(name, pa.string(), metadata=AS_JSON)


def without_dictionaries(schema: pa.Schema) -> pa.Schema:
    types = [one.value_type if pa.types.is_dictionary(one) else one for one in schema.types]
    return pa.schema(list(zip(schema.names, types, strict=True)))


def values_of(batch: pa.RecordBatch) -> list[tuple[Row, str]]:
    """Each row, with the reason why it cannot be read if there is one."""
    try:
        return [(values, "") for values in batch.to_pylist()]
    except ValueError as error:  # bytes that are no text, a time that Python cannot hold
        if len(batch) == 1:
            return [({}, f"it cannot be read: {error}")]
        return [values_of(batch.slice(place, 1))[0] for place in range(len(batch))]


def plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Dates and decimals as text, since Python's are coarser."""
    columns = [
        column.cast(pa.string()) if pa.types.is_temporal(column.type) and not pa.types.is_duration(column.type)
        or pa.types.is_decimal(column.type) else column
        for column in batch.columns
    ]  # fmt: skip
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _of_fields(number: int, header: Sequence[str], fields: Sequence[str]) -> Record:
    raw = " | ".join(fields)[:SHOWN]
    if any(map(is_strange, fields)):
        return Record(number, {}, STRANGE, readable(raw))
    if len(fields) != len(header):
        return Record(number, {}, f"it has {len(fields)} fields, and the header has {len(header)}", raw)
    return Record(number, dict(zip(header, fields, strict=True)))


def _of_json(number: int, line: bytes) -> Record:
    raw = line[:SHOWN].decode("utf-8", "backslashreplace").rstrip()
    try:
        values = json.loads(line.decode("utf-8"), parse_constant=_refuse)
        if not isinstance(values, dict):
            return Record(number, {}, "it is not a JSON object with columns as keys", raw)
        if b"\\u" in line:
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        return Record(number, {}, STRANGE, raw)
    except UnicodeEncodeError:
        return Record(number, {}, "it holds half a character (a lone surrogate)", raw)
    except (ValueError, RecursionError) as error:
        return Record(number, {}, f"it is not JSON: {error}", raw)
    return Record(number, values)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number there")


def is_strange(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def readable(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _whole(line: bytes, stream: Any) -> bytes:
    if len(line) < LONGEST_LINE or line.endswith(b"\n"):
        return line
    while (rest := stream.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
        pass
    return line + b"\xff\n"


def _ratio(part: float, whole: float) -> float:
    return min(1.0, part / whole)
