"""Rows with further columns, written behind one another in a format that need not be that of the input."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openbook.config import Format
from openbook.data.records import AS_JSON, DELIMITERS, Record, RecordFile

GROUP_ROWS, GROUP_BYTES = 1 << 16, 1 << 26  # of a row group of Parquet
TYPES = {"int": pa.int64(), "float": pa.float64(), "str": pa.string(), "bool": pa.bool_()}


def added_field(name: str, kind: str) -> pa.Field:
    """A column of numbers, texts or truth values; or of anything, as JSON."""
    return pa.field(name, TYPES.get(kind, pa.string()), metadata=None if kind in TYPES else AS_JSON)


class RowWriter:
    """Bytes that follow one another in a file of their own, which `complete` makes the output.

    CSV, TSV and JSON lines are written as they will be; what will be Parquet is a stream of Arrow until then.
    """

    def __init__(self, format: Format, records: RecordFile, added: Sequence[pa.Field]):
        self.format, self.columns, self.added = format, records.columns, list(added)
        self.given = records.schema
        self.schema = pa.schema([*records.schema, *added])

    def beginning(self) -> bytes:
        if self.format == "jsonl":
            return b""
        return (
            self.schema.serialize().to_pybytes() if self.format == "parquet" else self._separated([self.schema.names])
        )

    def encoded(self, records: Sequence[Record], columns: Sequence[Sequence[Any]]) -> bytes:
        """These rows with their values of the added columns."""
        if self.format == "parquet":
            batches = self._table(records, columns).to_batches()
            return b"".join(batch.serialize().to_pybytes() for batch in batches)
        added = list(zip(*columns, strict=True))
        if self.format == "jsonl":
            names = [one.name for one in self.added]
            rows = (
                record.values | dict(zip(names, own, strict=True)) for record, own in zip(records, added, strict=True)
            )
            return "".join(f"{as_json(row)}\n" for row in rows).encode()
        return self._separated(
            [cell(record.values.get(name)) for name in self.columns] + [cell(value) for value in own]
            for record, own in zip(records, added, strict=True)
        )

    def complete(self, spool: Path, output: Path) -> None:
        """Put what was written in the output's place, all at once. It may be done again while `spool` is there."""
        if self.format == "parquet":
            whole = spool.with_name("whole.parquet")
            write_parquet(spool, whole)
            os.replace(whole, output)
            spool.unlink()
        else:
            os.replace(spool, output)

    def _separated(self, rows: Iterable[Sequence[str]]) -> bytes:
        text = io.StringIO()
        csv.writer(text, delimiter=DELIMITERS[self.format], lineterminator="\n").writerows(rows)
        return text.getvalue().encode()

    def _table(self, records: Sequence[Record], columns: Sequence[Sequence[Any]]) -> pa.Table:
        if records and records[0].origin is not None:
            parts = groupby((record.origin for record in records if record.origin), key=lambda origin: id(origin[0]))
            groups = [list(group) for _, group in parts]
            batches = [group[0][0].take(pa.array([place for _, place in group])) for group in groups]
            given = pa.Table.from_batches(batches).columns
        else:
            given = [array_of([r.values.get(one.name) for r in records], one) for one in self.given]
        own = [array_of(values, one) for values, one in zip(columns, self.added, strict=True)]
        return pa.Table.from_arrays([*given, *own], schema=self.schema).combine_chunks()


def array_of(values: Sequence[Any], field: pa.Field) -> pa.Array:
    if field.metadata is not None:
        values = [None if value is None else as_json(value) for value in values]
    return pa.array(values, field.type)


def cell(value: Any) -> str:
    """Text as it is, nothing for nothing, anything else as JSON."""
    return value if isinstance(value, str) else "" if value is None else as_json(value)


def as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_told)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=_told)


def write_parquet(stream: Path, path: Path) -> None:
    """Arrow's stream of small batches as Parquet with row groups of a useful size."""
    with (
        pa.OSFile(str(stream)) as source,
        pa.ipc.open_stream(source) as batches,
        pq.ParquetWriter(path, batches.schema) as writer,
    ):
        group: list[pa.RecordBatch] = []
        for batch in batches:
            group.append(batch)
            if sum(map(len, group)) >= GROUP_ROWS or sum(one.nbytes for one in group) >= GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(group))
                group = []
        if group:
            writer.write_table(pa.Table.from_batches(group))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _told(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _finite(value: Any) -> Any:
    """JSON knows no infinity: nothing stands for it, and for what is not a number."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
