"""The Pile's JSON lines: `{"text": ..., "meta": {"pile_set_name": ...}}`."""

from __future__ import annotations

import json
from collections.abc import Iterator

from biomedlm_jax.corpus import files
from biomedlm_jax.corpus.records import Document, ReadReport, Selection


def read(file: str, report: ReadReport, selection: Selection) -> Iterator[Document]:
    """The documents of a file of JSON lines, where blank lines are no records."""
    for number, line in enumerate(files.lines(files.chunks(file, report)), 1):
        if line is None:
            report.drop("too long", file, number)
        elif line.strip():
            document = _document(line, file, number, report, selection)
            if document:
                yield document


def _document(line: bytes, file: str, number: int, report: ReadReport, selection: Selection) -> Document | None:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return report.drop("invalid UTF-8", file, number)
    except (ValueError, RecursionError):  # besides syntax: numbers of over 4,300 digits, absurdly deep nesting
        return report.drop("not JSON", file, number)
    text = record.get(selection.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return report.drop("no text", file, number)
    try:
        name = record["meta"]["pile_set_name"]
    except (KeyError, TypeError):
        name = None
    if selection.pile_sets and not isinstance(name, str):
        return report.drop("no set name", file, number)
    if selection.pile_sets and name not in selection.pile_sets:
        return report.drop("another set", file, number)
    return report.keep(text, name if isinstance(name, str) else "json", file, number)
