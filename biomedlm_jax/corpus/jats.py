"""PubMed Central's open-access articles in JATS XML: files of one article, or tar archives of them.

https://pmc.ncbi.nlm.nih.gov/tools/openftlist/, https://jats.nlm.nih.gov/archiving/
"""

from __future__ import annotations

import io
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from biomedlm_jax.corpus import files, xml_text
from biomedlm_jax.corpus.records import Document, ReadReport, Selection
from biomedlm_jax.errors import UserError

# What is no running text. Citations in it, such as [1], are.
_LEFT_OUT = frozenset(
    ("table-wrap", "table", "disp-formula", "tex-math", "fig", "fig-group", "graphic", "media")
    + ("supplementary-material", "fn", "fn-group", "ref-list", "object-id", "permissions")
)
_PARAGRAPHS = frozenset(("p", "verse-line", "speech", "disp-quote", "statement", "boxed-text", "def-list", "list"))
_DEEPEST = 100
"""Sections within sections that are followed."""


def read(file: str, report: ReadReport, selection: Selection) -> Iterator[Document]:
    """Articles: the title, the abstract and the body with the titles of its sections, a blank line between all of them.

    Left out are tables, figures, displayed formulas, notes and references. Members of archives are read where they
    are, and never written anywhere, whatever their names.

    Raises:
      UserError: the file cannot be read, or is a broken archive.
    """
    content = files.chunks(file, report)
    head = files.head(content, tarfile.BLOCKSIZE)
    if is_tar(head):
        yield from _read_tar(file, _Stream(head, content), report, selection)
        return
    data = _joined(head, content)
    if data is None:
        report.drop("too long", file, 1)
    else:
        yield from _documents(data, file, "1", report, selection)


def is_tar(head: bytes) -> bool:
    """Whether content that begins so is a tar archive."""
    return head[257:262] == b"ustar"


def _joined(head: bytes, content: Iterator[bytes]) -> bytes | None:
    pieces, size = [head], len(head)
    for chunk in content:
        size += len(chunk)
        if size <= files.MAX_RECORD_BYTES:
            pieces.append(chunk)
        else:
            pieces.clear()
    return b"".join(pieces) if size <= files.MAX_RECORD_BYTES else None


def _read_tar(file: str, stream: _Stream, report: ReadReport, selection: Selection) -> Iterator[Document]:
    try:
        # Not in mode "r|", whose blocks may be as large as a header says.
        with tarfile.TarFile(fileobj=stream, mode="r", errorlevel=1) as archive:
            while member := archive.next():
                archive.members = []  # type: ignore[attr-defined]  # which it would collect
                if not member.isreg() or not member.name.lower().endswith((".xml", ".nxml")):
                    if not member.isdir():
                        report.drop("not XML", file, member.name)
                elif member.size > files.MAX_RECORD_BYTES:
                    report.drop("too long", file, member.name)
                else:
                    content = archive.extractfile(member)
                    data = content.read() if content else b""
                    if len(data) < member.size:
                        raise tarfile.ReadError(f"{member.name!r} is cut short")
                    yield from _documents(data, file, member.name, report, selection)
        if not stream.ended_well:
            raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError, ValueError, OverflowError, IndexError) as error:
        raise UserError(
            f"{files.shown(file)}: the tar archive is broken or cut short ({files.shown(str(error))}); fetch it again, "
            "or leave it out"
        ) from error


class _Stream(io.RawIOBase):
    """Decompressed content as a file that can only go forward, and gives no more than a record at once."""

    def __init__(self, head: bytes, content: Iterator[bytes]):
        self._buffer, self._content, self._at = head, content, 0
        self.ended_well = False
        """Whether the last thing read was the block of zeros that ends an archive."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > files.MAX_RECORD_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        pieces, missing = [], size
        while missing:
            if not self._buffer:
                self._buffer = next(self._content, b"")
                if not self._buffer:
                    break
            pieces.append(self._buffer[:missing])
            self._buffer = self._buffer[missing:]
            missing -= len(pieces[-1])
        data = b"".join(pieces)
        self._at += len(data)
        if size == tarfile.BLOCKSIZE:
            self.ended_well = data == bytes(tarfile.BLOCKSIZE)
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._at:
            raise tarfile.ReadError("a header points backwards")
        while self._at < offset and self.read(min(offset - self._at, files.PIECE_BYTES)):
            pass
        return self._at


def _documents(data: bytes, file: str, place: str, report: ReadReport, selection: Selection) -> Iterator[Document]:
    """The articles of a file: one, or some in a collection; those within articles, as replies are, are none."""
    try:
        root = xml_text.parse(data)
    except xml_text.MalformedError:
        report.drop("malformed XML", file, place)
        return
    articles = list(_outermost(root, "article"))
    if not articles:
        report.drop("wrong type", file, place)
    for number, article in enumerate(articles, 1):
        where = place if len(articles) == 1 else f"{place} (article {number})"
        if document := _document(article, file, where, report, selection):
            yield document


def _outermost(root: ET.Element, name: str) -> Iterator[ET.Element]:
    """Elements of a name that are in no other of it, in their order."""
    pending = [root]
    while pending:
        element = pending.pop()
        if xml_text.name(element) == name:
            yield element
        else:
            pending += reversed(element)


def _document(article: ET.Element, file: str, place: str, report: ReadReport, selection: Selection) -> Document | None:
    language = article.get("{http://www.w3.org/XML/1998/namespace}lang", "en")
    if selection.languages and _three_letters(language) not in selection.languages:
        return report.drop("another language", file, place)
    meta = _child(_child(article, "front"), "article-meta")
    parts = [xml_text.text(_child(_child(meta, "title-group"), "article-title"), _LEFT_OUT)]
    abstract = _abstract(meta)
    if abstract is not None:
        parts += ["Abstract", *_paragraphs(abstract)]
    body = _child(article, "body")
    if body is not None:
        parts += _paragraphs(body)
    pmids = [
        element.text or ""
        for element in (meta if meta is not None else ())
        if xml_text.name(element) == "article-id" and element.get("pub-id-type") == "pmid"
    ]
    text = "\n\n".join(part for part in parts if part)
    return report.keep(text, "PubMed Central", file, place, xml_text.number(pmids[0] if pmids else None))


def _abstract(meta: ET.Element | None) -> ET.Element | None:
    """The abstract proper, before those of a kind of their own: summaries for laymen, pictures, highlights."""
    abstracts = [child for child in (meta if meta is not None else ()) if xml_text.name(child) == "abstract"]
    return next((element for element in abstracts if not element.get("abstract-type")), next(iter(abstracts), None))


def _child(element: ET.Element | None, name: str) -> ET.Element | None:
    return next((child for child in (element if element is not None else ()) if xml_text.name(child) == name), None)


def _paragraphs(element: ET.Element, depth: int = 0) -> Iterator[str]:
    """The titles and paragraphs of a section and of those in it."""
    for child in element:
        name = xml_text.name(child)
        if name in _PARAGRAPHS or name in ("title", "label"):
            # A section's number alone says nothing.
            if name != "label":
                yield xml_text.text(child, _LEFT_OUT)
        elif name and name not in _LEFT_OUT and depth < _DEEPEST:
            yield from _paragraphs(child, depth + 1)


def _three_letters(language: str) -> str:
    """PubMed's code of a language: JATS has those of two letters."""
    two = language.lower().split("-")[0]
    return LANGUAGES.get(two, two)


# ISO 639-1 to what NLM writes, ISO 639-2/B; of languages that PubMed Central has articles in.
LANGUAGES = {
    "en": "eng",
    "de": "ger",
    "fr": "fre",
    "es": "spa",
    "pt": "por",
    "it": "ita",
    "ru": "rus",
    "zh": "chi",
    "ja": "jpn",
    "ko": "kor",
    "pl": "pol",
    "nl": "dut",
    "tr": "tur",
    "cs": "cze",
    "hu": "hun",
    "ar": "ara",
    "fa": "per",
    "da": "dan",
    "sv": "swe",
    "no": "nor",
    "fi": "fin",
    "el": "gre",
    "he": "heb",
    "uk": "ukr",
    "ro": "rum",
    "bg": "bul",
    "hr": "hrv",
    "sr": "srp",
    "sk": "slo",
    "sl": "slv",
    "ca": "cat",
    "vi": "vie",
}
