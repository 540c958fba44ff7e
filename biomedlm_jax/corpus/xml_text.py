"""What the readers of NLM's XML share: parsing one record, safely, and the text of an element."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Set
from xml.parsers import expat

_ELEMENT = re.compile(rb"<[A-Za-z]")
_NAMESPACE = re.compile(r"^\{[^}]*\}")
# JATS's elements that stand apart from the text around them, whether there is white space between them or not.
_APART = frozenset(
    ("p", "sec", "title", "subtitle", "label", "break", "list", "list-item", "def-list", "def-item", "term", "def")
    + ("term-head", "def-head", "boxed-text", "disp-quote", "disp-formula", "disp-formula-group", "statement", "speech")
    + (
        "speaker",
        "verse-group",
        "verse-line",
        "attrib",
        "caption",
        "fig",
        "fig-group",
        "table-wrap",
        "table",
        "preformat",
    )
    + ("code", "tr", "td", "th", "array", "media", "supplementary-material", "DispFormula")
)


class MalformedError(ValueError):
    """A record is no XML that these readers take."""


def parse(data: bytes) -> ET.Element:
    """The root of a document of XML. No file that it names is read, and no entity that it declares is known.

    Raises:
      MalformedError: it is not well-formed, or declares entities, as bombs do.
    """
    # What begins with an element declares nothing.
    if not _ELEMENT.match(data):
        _refuse_entities(data)
    try:
        return ET.fromstring(data)
    except (ET.ParseError, ValueError, LookupError) as error:  # the latter two: unknown encodings
        raise MalformedError(str(error)) from error


def _refuse_entities(data: bytes) -> None:
    """Reads what comes before the root as expat does, whatever its encoding."""

    def declared(*_: object) -> None:
        raise MalformedError("it declares entities")

    def begins(*_: object) -> None:
        raise StopIteration

    parser = expat.ParserCreate()
    parser.EntityDeclHandler = declared
    parser.StartElementHandler = begins
    try:
        parser.Parse(data, True)
    except StopIteration:
        pass
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise MalformedError(str(error)) from error


def text(element: ET.Element | None, leave_out: Set[str] = frozenset()) -> str:
    """The text of an element and those in it, without markup, in one line; paragraphs and the like have spaces between.

    Args:
      leave_out: names of elements, without namespaces, whose text is not wanted.
    """
    if element is None:
        return ""
    parts: list[str] = []
    # Not recursive: elements may be nested as deep as one likes.
    pending: list[ET.Element | str | None] = [element]
    while pending:
        item = pending.pop()
        if item is None or isinstance(item, str):
            parts.append(item or "")
            continue
        if item is not element:
            gap = " " if name(item) in _APART else ""
            pending += [item.tail, gap]
            parts.append(gap)
            if name(item) in leave_out:
                continue
        pending += reversed(item)
        parts.append(item.text or "")
    return " ".join("".join(parts).split())


def number(text: str | None) -> int:
    """A number that an int64 holds; 0 if it is none."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else 0


def name(element: ET.Element) -> str:
    """The name of an element, without its namespace; empty for comments and processing instructions."""
    return _NAMESPACE.sub("", element.tag) if isinstance(element.tag, str) else ""
