"""Readers of raw text: The Pile's JSON lines, Parquet, NLM's PubMed XML, PubMed Central's JATS, and plain text.

A broken record is counted by its reason, its place is kept for the manifest, and reading goes on. A broken archive
ends the run with its name. Neither vanishes silently. Memory is bounded whatever the input.

`files.py` finds and opens files, here or behind URLs, and decompresses them; `records.py` has what is counted; each
format has a module with `read(file, report, selection)`. `pile_pubmed.py` is the same text as a TFDS data set. The
bundled synthetic text is in `synthetic.py`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from biomedlm_jax.corpus import files as _files
from biomedlm_jax.corpus import jats, json_lines, parquet, pubmed, text
from biomedlm_jax.corpus.files import expand_globs, file_identity, file_size, real_path, shown
from biomedlm_jax.corpus.pile_pubmed import PilePubmed
from biomedlm_jax.corpus.records import BROKEN, MAX_SAMPLES, PUBMED_SETS, Document, ReadReport, Selection
from biomedlm_jax.errors import UserError

__all__ = [
    "BROKEN",
    "MAX_SAMPLES",
    "PUBMED_SETS",
    "Document",
    "PilePubmed",
    "ReadReport",
    "Selection",
    "expand_globs",
    "file_identity",
    "file_size",
    "read_documents",
    "read_mixed",
    "real_path",
    "shown",
    "tokenizer_texts",
]

_PUBMED = Selection()
_READERS: dict[str, Callable[[str, ReadReport, Selection], Iterator[Document]]] = {
    "pile": json_lines.read,
    "parquet": parquet.read,
    "pubmed_xml": pubmed.read,
    "jats_xml": jats.read,
    "text": text.read,
}


def read_documents(
    source: str, files: Sequence[str], report: ReadReport, selection: Selection = _PUBMED
) -> Iterator[Document]:
    """The documents of `files`, in their order.

    Each file may be plain, gzip or zstd, whatever its name; Parquet files, compressed inside, are not in archives.

    Args:
      source: "pile" for JSON lines, "parquet", "pubmed_xml", "jats_xml" (articles, or tar archives of them), "text".
      files: paths and URLs, as from `expand_globs`.
      report: counts what is read; complete when the iterator ends.
      selection: what to keep. Of several versions of a PubMed record all are kept, also of deleted ones: an update
        file that is read later decides (`report.deleted`).

    Raises:
      UserError: an unknown source, at once; a file that cannot be read, a corrupt or truncated archive, when reading
        reaches it.
    """
    if source not in _READERS:
        raise UserError(f"{source!r} is no format of text files: write one of {', '.join(_READERS)}")
    return (document for file in files for document in _READERS[source](file, report, selection))


def read_mixed(files: Sequence[str], report: ReadReport, selection: Selection = _PUBMED) -> Iterator[Document]:
    """Documents of files of any of the formats, told apart by name (".json", ".parquet") or else by their beginning."""
    for file in files:
        yield from read_documents(_source(file), [file], report, selection)


def _source(file: str) -> str:
    name = Path(file).name
    if ".json" in name:
        return "pile"
    if name.endswith(".parquet"):
        return "parquet"
    content = _files.chunks(file, ReadReport())
    head = _files.head(content, 1 << 16)
    if head.startswith(b"PAR1"):
        return "parquet"
    if jats.is_tar(head):
        return "jats_xml"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        if b"<PubmedArticleSet" in head:
            return "pubmed_xml"
        if b"<article" in head or name.split(".", 1)[-1].startswith(("xml", "nxml")):
            return "jats_xml"
    line = next(_files.lines(itertools.chain([head], content)), b"")
    try:
        return "pile" if line is not None and isinstance(json.loads(line), dict) else "text"
    except (ValueError, RecursionError):
        return "text"


def tokenizer_texts(read: Callable[[], Iterator[Document]]) -> Iterator[str]:
    """What a tokenizer is trained on: the abstracts, as the published one was, or all text where there are none.

    Args:
      read: starts to read the documents from the beginning.
    """
    abstracts = (document for document in read() if document.source == "PubMed Abstracts")
    first = next(abstracts, None)
    return (document.text for document in (itertools.chain([first], abstracts) if first else read()))
