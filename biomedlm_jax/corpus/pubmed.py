"""NLM's PubMed baseline and update files, `pubmedYYnNNNN.xml.gz`.

https://www.nlm.nih.gov/bsd/licensee/elements_descriptions.html
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from biomedlm_jax.corpus import files, xml_text
from biomedlm_jax.corpus.records import Document, ReadReport, Selection
from biomedlm_jax.errors import UserError

# Each record is cut out of the file and parsed by itself: one that is malformed costs no other, and nothing that the
# file declares before its first record, entities above all, is ever read.
_BEGIN = re.compile(rb"<(PubmedArticle|PubmedBookArticle|DeleteCitation)(?=[\s/>])")
_BEGIN_OR_ROOT_END = re.compile(_BEGIN.pattern + rb"|</PubmedArticleSet\s*>|<PubmedArticleSet\s*/>")
# Beginning with so many fixed characters, patterns are found twice as fast.
_END = re.compile(rb"</Pubmed(?:Book)?Article(Set)?\s*>")
_DELETIONS_END = re.compile(rb"</DeleteCitation\s*>|</PubmedArticle(Set)\s*>")
_LONGEST_TAG = 64
# What may stand between records.
_NO_RECORD = re.compile(
    rb"\s+|<\?.*?\?>|<!--(?:.*?-->|[^>]*$)|<!DOCTYPE[^>\[]*(?:\[.*?\]\s*)?>|</?PubmedArticleSet[^>]*>", re.DOTALL
)


def read(file: str, report: ReadReport, selection: Selection) -> Iterator[Document]:
    """The records of a file that have an abstract: the title, and below it the abstract, a line for each of its
    labelled sections, `LABEL: text`. Copyright lines, other abstracts and keywords are left out.

    Raises:
      UserError: the file cannot be read, is cut short, or is not of this format.
    """
    for line, kind, data in _records(file, report):
        if data is None:
            report.drop("too long", file, line)
            continue
        try:
            record = xml_text.parse(data)  # which refuses what a damaged tag left between records
        except xml_text.MalformedError:
            report.drop("malformed XML", file, line)
            continue
        if kind == b"DeleteCitation":
            for pmid in record.iter("PMID"):
                if number := xml_text.number(pmid.text):
                    report.deleted.append(number)
                else:
                    report.drop("wrong type", file, line)
        elif kind == b"PubmedBookArticle":
            report.drop("no article", file, line)
        else:
            document = _document(record, file, line, report, selection)
            if document:
                yield document


def _document(record: ET.Element, file: str, line: int, report: ReadReport, selection: Selection) -> Document | None:
    citation = record.find("MedlineCitation")
    pmid = citation.find("PMID") if citation is not None else None
    article = citation.find("Article") if citation is not None else None
    number = xml_text.number(pmid.text) if pmid is not None else 0
    if pmid is None or article is None or not number:
        return report.drop("wrong type", file, line)
    place = f"{line} (PMID {number})"
    languages = [element.text for element in article.iter("Language")]
    # In the order of NLM's list the first is that of the article.
    if selection.languages and languages and languages[0] not in selection.languages:
        return report.drop("another language", file, place)
    title = xml_text.text(article.find("ArticleTitle"))
    sections = [_section(element) for element in article.iterfind("Abstract/AbstractText")]
    abstract = "\n".join(section for section in sections if section)
    if not abstract:
        return report.drop("no abstract", file, place)
    text = f"{title}\n{abstract}" if title else abstract
    return report.keep(text, "PubMed Abstracts", file, place, number, xml_text.number(pmid.get("Version")) or 1)


def _section(element: ET.Element) -> str:
    text, label = xml_text.text(element), " ".join(element.get("Label", "").split())
    return f"{label}: {text}" if text and label and label != "UNLABELLED" else text


def _records(file: str, report: ReadReport) -> Iterator[tuple[int, bytes, bytes | None]]:
    """The line, the kind and the bytes of each record; None for the bytes of one over `files.MAX_RECORD_BYTES`."""
    content = files.chunks(file, report)
    head = files.head(content, 1 << 16)
    if not re.search(rb"<PubmedArticleSet|<DeleteCitation", head):
        raise UserError(f"{files.shown(file)} is no PubMed XML: there is no <PubmedArticleSet> in it")
    scanner = _Scanner(head, content)
    ended = False
    while True:
        line = scanner.line
        begin, between = scanner.until(_BEGIN_OR_ROOT_END)
        if between is None or _holds_more(between):
            yield line, b"", between
        if not begin:
            break
        line, kind = scanner.line, begin[1]
        scanner.skip(begin)
        ended = not kind
        if ended:
            continue
        end, data = scanner.until(_DELETIONS_END if kind == b"DeleteCitation" else _END)
        if not end:
            raise UserError(f"{files.shown(file)}: the file is cut short, in the record of line {line}; fetch it again")
        if not end[1]:  # of the whole file, it is left for later
            scanner.skip(end)
        if data is None:
            yield line, kind, None
        else:
            yield from _split(line, begin[0] + data + (b"" if end[1] else end[0]))
    if not ended:
        raise UserError(f"{files.shown(file)}: the file is cut short, at line {scanner.line}; fetch it again")


def _holds_more(between: bytes) -> bool:
    between = between.strip()
    # What a file begins with is short; looking for its parts takes time quadratic in the length at worst.
    return len(between) > 1 << 14 or bool(_NO_RECORD.sub(b"", between))


def _split(line: int, data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """A record, after those before it that lack their end and so are malformed."""
    begins = list(_BEGIN.finditer(data))
    ends = [*(begin.start() for begin in begins[1:]), len(data)]
    for begin, end in zip(begins, ends, strict=True):
        yield line, begin[1], data[begin.start() : end]
        line += data.count(b"\n", begin.start(), end)


class _Scanner:
    """Goes through content from tag to tag."""

    def __init__(self, head: bytes, content: Iterator[bytes]):
        self._buffer, self._content, self._at = head, content, 0
        self.line = 1
        """Of what comes next."""

    def until(self, tag: re.Pattern[bytes]) -> tuple[re.Match[bytes] | None, bytes | None]:
        """Goes to the next tag, or the end of all; what was passed, or None if it is too long for a record."""
        passed, size = [], 0
        while True:
            found = tag.search(self._buffer, self._at)
            # What ends the buffer may be the beginning of a tag.
            stop = found.start() if found else max(self._at, len(self._buffer) - _LONGEST_TAG)
            more = b"" if found else next(self._content, b"")
            if not found and not more:
                stop = len(self._buffer)
            size += stop - self._at
            if size <= files.MAX_RECORD_BYTES:
                passed.append(self._buffer[self._at : stop])
            else:
                passed.clear()
            self.line += self._buffer.count(b"\n", self._at, stop)
            self._at = stop
            if not more:
                return found, b"".join(passed) if size <= files.MAX_RECORD_BYTES else None
            self._buffer, self._at = self._buffer[stop:] + more, 0

    def skip(self, tag: re.Match[bytes]) -> None:
        """Goes behind the tag that was found."""
        self.line += tag[0].count(b"\n")
        self._at = tag.end()
