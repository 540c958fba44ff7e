"""Plain text: a file is a document."""

from __future__ import annotations

from collections.abc import Iterator

from biomedlm_jax.corpus import files
from biomedlm_jax.corpus.records import Document, ReadReport, Selection

# A longer file is several documents, so that memory stays bounded.
MAX_DOCUMENT_BYTES = 16 << 20


def read(file: str, report: ReadReport, selection: Selection) -> Iterator[Document]:
    """The file as one document, kept as it is but for a byte order mark; a longer one cut at ends of lines."""
    for first_line, data in _parts(file, report):
        try:
            text = data.decode("utf-8-sig" if first_line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            report.drop("invalid UTF-8", file, first_line + data.count(b"\n", 0, error.start))
        else:
            document = report.keep(text, "text", file, first_line)
            if document:
                yield document


def _parts(file: str, report: ReadReport) -> Iterator[tuple[int, bytes]]:
    """Parts of the file with the numbers of their first lines, and at least one part."""
    part: list[bytes] = []
    first_line, size, number = 1, 0, 0
    for number, line in enumerate(files.lines(files.chunks(file, report)), 1):
        if part and (line is None or size + len(line) > MAX_DOCUMENT_BYTES):
            yield first_line, b"\n".join(part) + b"\n"
            part, size = [], 0
        if line is None:
            report.drop("too long", file, number)
            continue
        if not part:
            first_line = number
        part.append(line)
        size += len(line) + 1
    # What follows the last newline of a file that was cut before is no document of its own.
    if part and (size > 1 or first_line == 1):
        yield first_line, b"\n".join(part)
