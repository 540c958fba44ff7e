"""Parquet with a column of text, as Hugging Face's data sets have it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from biomedlm_jax.corpus import files
from biomedlm_jax.corpus.records import Document, ReadReport, Selection
from biomedlm_jax.errors import UserError, reason

_ROWS_AT_ONCE = 256
# Read ahead of a column; without a limit, a row group's whole column is.
_BUFFER_BYTES = 1 << 20


def read(file: str, report: ReadReport, selection: Selection) -> Iterator[Document]:
    """The rows of a file; of The Pile's sets, if some are selected, by the column meta, a struct or JSON.

    Raises:
      UserError: the file cannot be read, is no Parquet, or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    size, number = files.file_size(file), 0
    with files.RawFile(file) as raw:
        if raw.read(4).startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
            raise UserError(f"{files.shown(file)} is a Parquet file in an archive: unpack it (it is compressed inside)")
        try:
            table = pyarrow.parquet.ParquetFile(raw, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            columns = _columns(table.schema_arrow, file, selection)
            rows = table.metadata.num_rows
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
                texts = _as_bytes(batch.column(columns[0]))
                metas = batch.column(columns[1]) if len(columns) > 1 else [None] * len(texts)
                for text, meta in zip(texts, metas, strict=True):
                    number += 1
                    document = _document(text.as_py(), meta, file, f"row {number}", report, selection)
                    if document:
                        yield document
                # How far the file is read is not known better.
                report.raw_bytes += size * len(texts) // rows
        except (pyarrow.ArrowException, OSError, OverflowError, MemoryError, ValueError) as error:
            raise UserError(
                f"{files.shown(file)}: the Parquet file is damaged or cut short after row {number} "
                f"({files.shown(reason(error))}); fetch it again, or leave it out"
            ) from error


def _columns(schema: Any, file: str, selection: Selection) -> list[str]:
    """The names of the columns that are read.

    Raises:
      UserError: they are not there, or hold something else.
    """
    import pyarrow

    name = selection.text_field
    if schema.names.count(name) != 1:
        there = ", ".join(map(files.shown, schema.names))
        raise UserError(f"{files.shown(file)} has no column {name!r} but {there}: set data.text_field to one of them")
    kind = schema.field(name).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()):
        raise UserError(f"{files.shown(file)}: the column {name!r} holds no text but {files.shown(str(kind))}")
    if not selection.pile_sets:
        return [name]
    if schema.names.count("meta") != 1:
        raise UserError(
            f"{files.shown(file)} has no column 'meta' that names The Pile's sets: set data.pile_sets to [] to keep "
            "every row"
        )
    return [name, "meta"]


def _as_bytes(column: Any) -> Any:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary())


def _document(
    data: bytes | None, meta: Any, file: str, place: str, report: ReadReport, selection: Selection
) -> Document | None:
    name = _set_name(meta)
    if selection.pile_sets and name is None:
        return report.drop("no set name", file, place)
    if selection.pile_sets and name not in selection.pile_sets:
        return report.drop("another set", file, place)
    if data is None:
        return report.drop("empty", file, place)
    if len(data) > files.MAX_RECORD_BYTES:
        return report.drop("too long", file, place)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return report.drop("invalid UTF-8", file, place)
    return report.keep(text, name or "parquet", file, place)


def _set_name(meta: Any) -> str | None:
    try:
        meta = meta.as_py()
        name = (json.loads(meta) if isinstance(meta, str) else meta)["pile_set_name"]
    except (AttributeError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None
