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
_LONGEST_BEGIN = len(b"<PubmedBookArticle ")
_ROOT_END = b"</PubmedArticleSet>"


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
            record = xml_text.parse(data)
        except xml_text.MalformedError:
            report.drop("malformed XML", file, line)
            continue
        if kind == b"DeleteCitation":
            report.deleted += [number for pmid in record.iter("PMID") if (number := xml_text.number(pmid.text))]
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
    buffer = files.head(content, 1 << 16)
    if not re.search(rb"<PubmedArticleSet|<DeleteCitation", buffer):
        raise UserError(f"{files.shown(file)} is no PubMed XML: there is no <PubmedArticleSet> in it")
    line, ended = 1, False
    while True:
        begin = _BEGIN.search(buffer)
        if not begin:
            # What ends the buffer may be the beginning of a tag.
            ended = ended or _ROOT_END in buffer
            cut = max(0, len(buffer) - max(_LONGEST_BEGIN, len(_ROOT_END)))
            line += buffer.count(b"\n", 0, cut)
            more = next(content, b"")
            if not more:
                if not ended:
                    raise UserError(f"{files.shown(file)}: the file is cut short, at line {line}; fetch it again")
                return
            buffer = buffer[cut:] + more
            continue
        ended = False
        line += buffer.count(b"\n", 0, begin.start())
        kind = begin[1]
        data, buffer, lines = _until(buffer[begin.start() :], b"</" + kind + b">", content)
        if lines < 0:
            raise UserError(f"{files.shown(file)}: the file is cut short, in the record of line {line}; fetch it again")
        yield line, kind, data
        line += lines


def _until(buffer: bytes, end: bytes, content: Iterator[bytes]) -> tuple[bytes | None, bytes, int]:
    """What comes before and with `end`, or None if it is too long; what follows; and the newlines of the former, -1 if
    there is no end.
    """
    pieces, size, newlines, searched = [], 0, 0, 0
    while (at := buffer.find(end, searched)) < 0:
        # All but what may be the beginning of `end` is set aside.
        cut = max(0, len(buffer) - len(end) + 1)
        size += cut
        newlines += buffer.count(b"\n", 0, cut)
        if size <= files.MAX_RECORD_BYTES:
            pieces.append(buffer[:cut])
        else:
            pieces.clear()
        more = next(content, b"")
        if not more:
            return None, b"", -1
        buffer = buffer[cut:] + more
    at += len(end)
    newlines += buffer.count(b"\n", 0, at)
    whole = size + at <= files.MAX_RECORD_BYTES
    return b"".join([*pieces, buffer[:at]]) if whole else None, buffer[at:], newlines
