"""Records of evaluation sets, in the formats in which these are handed out.

An evaluation set must be read whole: a broken record is an error, not a count.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from biomedlm_jax.corpus import ReadReport, shown
from biomedlm_jax.corpus.files import chunks
from biomedlm_jax.errors import UserError

_MAX_BYTES = 1 << 30

_Records = Iterator[tuple[str, Any]]


def records(file: str) -> _Records:
    """The records of a file, each with its name: the number of its line or row, from 1, or its key.

    The name of the file, before a .gz or .zst, tells the format:
      .jsonl    a line is a record
      .json     a list or dict of records, or lines as above
      .csv, .tsv    a row is a record; a header is not looked for
      .parquet  a row is a record
      .txt      a line is a record

    Raises:
      UserError: a broken record, or another format; names the file and the line.
    """
    name = re.split(r"[?#]", file)[0] if "://" in file else file
    extension = re.sub(r"\.(gz|zst)$", "", name.lower()).rpartition(".")[2]
    if extension == "parquet":
        return _parquet(file, _content(file))
    if extension not in _FORMATS:
        raise UserError(
            f"{shown(file)} is no evaluation set by its name: it must end in .parquet, .{', .'.join(_FORMATS)}"
        )
    return _FORMATS[extension](file, _text(file))


def _content(file: str) -> bytes:
    """All of a file, which is as large as evaluation sets are."""
    pieces, size = [], 0
    for chunk in chunks(file, ReadReport()):
        pieces.append(chunk)
        size += len(chunk)
        if size > _MAX_BYTES:
            raise UserError(f"{shown(file)} holds over {_MAX_BYTES >> 20} MiB: it is no evaluation set; leave it out")
    return b"".join(pieces)


def _broken(file: str, line: int, what: object) -> UserError:
    return UserError(f"{shown(file)}:{line}: {what}; an evaluation set must be read whole: repair it or fetch it again")


def _text(file: str) -> str:
    data = _content(file)
    try:
        # Lines may end as Windows ends them.
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise _broken(file, data.count(b"\n", 0, error.start) + 1, "not UTF-8") from error


def text_lines(file: str) -> list[str]:
    """All lines of a file of UTF-8, blank ones too, but for a last empty one.

    Raises:
      UserError: it cannot be read; names the file and the line.
    """
    return _text(file).removesuffix("\n").split("\n")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _txt(file: str, text: str) -> _Records:
    return ((str(number), line) for number, line in _lines(text))


def _parsed(text: str, file: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first_line + getattr(error, "lineno", 1) - 1
        raise _broken(file, line, f"not JSON ({getattr(error, 'msg', error)})") from error


def _jsonl(file: str, text: str) -> _Records:
    for number, line in _lines(text):
        record = _parsed(line, file, number)
        if not isinstance(record, dict | list | str):
            raise _broken(file, number, f"{line.strip()[:20]} is no record")
        yield str(number), record


def _json(file: str, text: str) -> _Records:
    if _are_json_lines(text):
        yield from _jsonl(file, text)
        return
    content = _parsed(text, file)
    if isinstance(content, list):
        yield from ((str(number), record) for number, record in enumerate(content, 1))
    elif isinstance(content, dict) and all(isinstance(value, dict | list) for value in content.values()):
        # PubMedQA's {id: record}, and BioASQ's {"questions": [record, ...]}.
        for key, value in content.items():
            if isinstance(value, dict):
                yield key, value
            else:
                yield from ((f"{key}[{index}]", record) for index, record in enumerate(value))
    else:
        yield "1", content


def _are_json_lines(text: str) -> bool:
    """Whether the first of several lines is JSON in itself, as in MedMCQA's files of the name .json."""
    lines = _lines(text)
    first, second = next(lines, None), next(lines, None)
    if not first or not second:
        return False
    try:
        json.loads(first[1])
    except (ValueError, RecursionError):
        return False
    return True


def _table(file: str, text: str, dialect: type[csv.Dialect]) -> _Records:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), dialect)
    line, columns = 1, None
    try:
        for row in reader:
            columns = columns or len(row)
            if row and len(row) != columns:
                raise csv.Error(f"{len(row)} fields, where the first row has {columns}")
            if row:
                yield str(line), row
            line = reader.line_num + 1
    except csv.Error as error:
        raise _broken(file, line, error) from error


class _Commas(csv.excel):
    strict = True


class _Tabs(csv.excel_tab):
    strict = True


class _TabsOnly(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def _csv(file: str, text: str) -> _Records:
    return _table(file, text, _Commas)


def _tsv(file: str, text: str) -> _Records:
    """In some, quotation marks stand for themselves: so they are read where else there is no table."""
    try:
        return iter(list(_table(file, text, _Tabs)))
    except UserError:
        return _table(file, text, _TabsOnly)


def _parquet(file: str, data: bytes) -> _Records:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{shown(file)}: to read Parquet, install pyarrow: pip install pyarrow") from error
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(io.BytesIO(data)).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield str(number), record
    except (pyarrow.ArrowException, OSError) as error:
        raise _broken(file, number + 1, str(error).splitlines()[0]) from error


_FORMATS: dict[str, Callable[[str, str], _Records]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "txt": _txt,
}
