"""Readers of raw text: The Pile's JSON lines and plain text files, compressed or not.

A broken record is counted by its reason, its place is kept for the manifest, and reading goes on. A broken archive
ends the run with its name: what lies behind the break cannot be counted. Neither vanishes silently. (What no reader
can see: a file cut exactly between two members of a concatenated archive, and altered bytes inside a zstd frame that
was written without a checksum.)

The bundled synthetic text is in `synthetic.py`.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import zstandard

from biomedlm_jax.errors import UserError
from biomedlm_jax.tokenizer import LONE_SURROGATE

PUBMED_SETS = ("PubMed Abstracts", "PubMed Central")

Reason = Literal["not JSON", "wrong type", "empty", "another set", "invalid UTF-8"]

# Reasons that mean damage; the others are ordinary in sound data.
BROKEN: tuple[Reason, ...] = ("not JSON", "wrong type", "invalid UTF-8")
# Places kept for each reason.
MAX_SAMPLES = 3
# Bytes read from a file at once: bounds the memory of decompression, about 3 times as much for text.
CHUNK_BYTES = 1 << 17


@dataclass(frozen=True)
class Document:
    """A text and where it is from: the name of The Pile's set, "text", or "synthetic"."""

    text: str
    source: str
    pmid: int = 0
    version: int = 0


@dataclass(frozen=True)
class Selection:
    pile_sets: tuple[str, ...] = PUBMED_SETS
    text_field: str = "text"
    languages: tuple[str, ...] = ("eng",)


def shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


def file_size(path: str) -> int:
    return os.stat(path).st_size


def file_identity(path: str) -> str:
    return f"{os.stat(path).st_size}-{os.stat(path).st_mtime_ns}"


@dataclass
class ReadReport:
    """What was read and what was left out, counted while reading."""

    documents: int = 0
    """Documents kept."""
    bytes: int = 0
    """Length of their text in UTF-8."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    replaced_surrogates: int = 0
    """Lone surrogates replaced by U+FFFD in the documents kept."""
    samples: dict[str, list[str]] = field(default_factory=dict)
    raw_bytes: int = field(default=0, compare=False)
    deleted: list[int] = field(default_factory=list)
    """The first places of each reason, as "file:line"."""

    @property
    def bad_fraction(self) -> float:
        """Broken records / all records; empty records and other sets are not broken."""
        seen = self.documents + self.dropped.total()
        return sum(self.dropped[reason] for reason in BROKEN) / max(seen, 1)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "dropped": dict(self.dropped),
            "replaced_surrogates": self.replaced_surrogates,
            "bad_fraction": self.bad_fraction,
            "samples": {reason: list(places) for reason, places in self.samples.items()},
        }

    def check(self, max_bad_fraction: float) -> None:
        """Refuses text of which too much is broken. Raises: UserError: names the first place."""
        if self.bad_fraction > max_bad_fraction:
            reason = next(reason for reason in BROKEN if self.samples.get(reason))
            raise UserError(
                f"{self.bad_fraction:.1%} of the records are broken, more than the {max_bad_fraction:.1%} allowed; "
                f"for instance {reason} at {self.samples[reason][0]}"
            )

    def drop(self, reason: Reason, file: str, line: int) -> None:
        """Counts a record that is left out."""
        self.dropped[reason] += 1
        places = self.samples.setdefault(reason, [])
        if len(places) < MAX_SAMPLES:
            places.append(f"{file}:{line}")


def expand_globs(patterns: Sequence[str]) -> list[str]:
    """The files that paths and globs (`*`, `?`, `[a-z]`, `**` for any folders) name, sorted, each once.

    Raises:
      UserError: a pattern matches no file.
    """
    files: set[str] = set()
    for pattern in map(os.path.expanduser, patterns):
        # A file whose name holds brackets is meant before the set of names that the brackets spell.
        matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        found = [match for match in matches if os.path.isfile(match)]
        if not found:
            hint = (
                f"it is a folder, write {pattern.rstrip('/')}/* for its files"
                if os.path.isdir(pattern)
                else (f"the current folder is {os.getcwd()}")
            )
            raise UserError(f"{pattern!r} matches no file ({hint})")
        files.update(found)
    return sorted(files)


def read_documents(
    source: str, files: Sequence[str], report: ReadReport, selection: Selection = Selection()
) -> Iterator[Document]:
    """The documents of `files`, in their order.

    Each file may be plain, gzip or zstd; its content tells, not its name.

    Args:
      source: "pile" for JSON lines `{"text": ..., "meta": {"pile_set_name": ...}}`, where blank lines are no records;
        "text" for plain text, where a file is one document, kept as it is but for a byte order mark.
      files: paths, as from `expand_globs`.
      report: counts what is read; complete when the iterator ends.
      pile_sets: which of The Pile's sets to keep.

    Raises:
      UserError: an unknown source, at once; a corrupt or truncated archive, when reading reaches it.
    """
    if source == "pile":
        return (document for file in files for document in _read_pile(file, report, frozenset(selection.pile_sets)))
    if source == "text":
        return (document for file in files for document in _read_text(file, report))
    raise UserError(f"{source!r} is no format of text files: write pile or text")


def read_mixed(files: Sequence[str], report: ReadReport, selection: Selection = Selection()) -> Iterator[Document]:
    """Documents of files of both formats, told apart by name (".json") or else by their first line."""
    for file in files:
        yield from read_documents("pile" if _is_pile(file) else "text", [file], report, selection)


def _is_pile(file: str) -> bool:
    if ".json" in Path(file).name:
        return True
    try:
        return isinstance(json.loads(next(_lines(file), b"")), dict)
    except ValueError:
        return False


def tokenizer_texts(read: Callable[[], Iterator[Document]]) -> Iterator[str]:
    """What a tokenizer is trained on: the abstracts, as the published one was, or all text where there are none.

    Args:
      read: starts to read the documents from the beginning.
    """
    abstracts = (document for document in read() if document.source == "PubMed Abstracts")
    first = next(abstracts, None)
    return (document.text for document in (itertools.chain([first], abstracts) if first else read()))


def _read_pile(file: str, report: ReadReport, pile_sets: frozenset[str]) -> Iterator[Document]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
            text, name = record["text"], record["meta"]["pile_set_name"]
        except UnicodeDecodeError:
            report.drop("invalid UTF-8", file, number)
        except (ValueError, RecursionError):  # besides syntax: numbers of over 4,300 digits, absurdly deep nesting
            report.drop("not JSON", file, number)
        except (KeyError, TypeError):
            report.drop("wrong type", file, number)
        else:
            if not isinstance(text, str) or not isinstance(name, str):
                report.drop("wrong type", file, number)
            elif name not in pile_sets:
                report.drop("another set", file, number)
            else:
                yield from _keep(text, name, file, number, report)


def _read_text(file: str, report: ReadReport) -> Iterator[Document]:
    data = b"".join(_chunks(file))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report.drop("invalid UTF-8", file, data.count(b"\n", 0, error.start) + 1)
    else:
        yield from _keep(text, "text", file, 1, report)


def _keep(text: str, source: str, file: str, line: int, report: ReadReport) -> Iterator[Document]:
    """The document, counted; none if it is blank."""
    if not text or text.isspace():
        report.drop("empty", file, line)
        return
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        text, replaced = LONE_SURROGATE.subn("\ufffd", text)
        report.replaced_surrogates += replaced
        size = len(text.encode())
    report.documents += 1
    report.bytes += size
    yield Document(text, source)


def _lines(file: str) -> Iterator[bytes]:
    """Lines without their newline, in time linear in a line's length however long it is."""
    pieces: list[bytes] = []
    for chunk in _chunks(file):
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        for piece in others:
            yield b"".join(pieces)
            pieces = [piece]
    yield b"".join(pieces)


def _chunks(file: str) -> Iterator[bytes]:
    """The content of a file, decompressed if it is an archive."""
    newlines = 0
    with open(file, "rb") as raw:
        head = raw.read(4)
        raw.seek(0)
        if not head and file.endswith((".gz", ".zst")):
            raise UserError(f"{file} is empty, not even an archive; fetch it again")
        try:
            for chunk in _decompressed(raw, head):
                yield chunk
                newlines += chunk.count(b"\n")
        except (EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(
                f"{file}: the archive is corrupt or truncated soon after line {newlines} ({error}); "
                "fetch it again, or leave it out"
            ) from error


def _decompressed(raw: BinaryIO, head: bytes) -> Iterator[bytes]:
    """Content by the magic number: RFC 1952 for gzip, RFC 8878 for zstd, whose parallel writers begin with a
    skippable frame; all else is plain.

    One loop serves both kinds, which may be several archives one after the other. zstandard's own stream reader ends
    quietly where a frame is cut short; a decoder that has not come to its end does not.
    """
    gzip = head.startswith(b"\x1f\x8b")
    zstd = head == b"\x28\xb5\x2f\xfd" or (head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5)
    # Large shards are often written with windows beyond the default limit of 128 MiB.
    frames = zstandard.ZstdDecompressor(max_window_size=2**31)
    decoder = None
    while data := raw.read(CHUNK_BYTES):
        if not gzip and not zstd:
            yield data
            continue
        while data:
            decoder = decoder or (zlib.decompressobj(wbits=31) if gzip else frames.decompressobj())
            yield decoder.decompress(data)
            data = decoder.unused_data
            if decoder.eof:
                decoder = None
    if decoder:
        raise EOFError("it ends before its last block")
