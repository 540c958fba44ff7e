"""What a tokenizer makes of words and of files, beside another: tables for a terminal."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from biomedlm_jax.corpus import Document
from biomedlm_jax.tokenizer.base import Tokenizer, valid

_BATCH_CHARACTERS = 1 << 20


@dataclasses.dataclass
class Measured:
    """Counts of a corpus."""

    words: Counter[str]
    """How often each of `forms` occurs as a whole word."""
    sources: dict[str, Counter[str]]
    """By source: 'documents', 'bytes', and tokens by the tokenizer's name, without those that end documents."""


def forms(word: str) -> tuple[str, str]:
    """How a word may stand in a text: at a start, or after a space, where its pieces are others."""
    return word, " " + word


def measure(documents: Iterable[Document], words: Sequence[str], tokenizers: Mapping[str, Tokenizer]) -> Measured:
    """Reads a corpus once.

    Args:
      documents: the corpus.
      words: counted where no letter, digit or underscore touches them, in the very case.
      tokenizers: by name.
    """
    measured = Measured(Counter(), {})
    patterns = [(word, re.compile(rf"( ?)(?<!\w){re.escape(word)}(?!\w)")) for word in dict.fromkeys(words)]
    for source, texts in _batches(documents):
        counts = measured.sources.setdefault(source, Counter())
        counts.update(documents=len(texts), bytes=sum(len(valid(text).encode()) for text in texts))
        for name, tokenizer in tokenizers.items():
            counts[name] += len(tokenizer.encode_array(texts)) - len(texts)
        for word, pattern in patterns:
            for text in texts:
                measured.words.update(space + word for space in pattern.findall(text))
    return measured


def _batches(documents: Iterable[Document]) -> Iterator[tuple[str, list[str]]]:
    """Texts of one source at a time, not many."""
    waiting: dict[str, list[str]] = {}
    sizes: Counter[str] = Counter()
    for document in documents:
        waiting.setdefault(document.source, []).append(document.text)
        sizes[document.source] += len(document.text)
        if sizes[document.source] > _BATCH_CHARACTERS:
            yield document.source, waiting.pop(document.source)
            del sizes[document.source]
    yield from waiting.items()


def words_table(words: Sequence[str], tokenizers: Mapping[str, Tokenizer], measured: Measured | None) -> str:
    """One line for each form of each word: its count in the corpus, and its tokens, pieces and ids."""
    header = ["text", *(["count"] if measured else [])]
    for name in tokenizers:
        header += [f"{name} {column}".strip() for column in ("tokens", "pieces", "ids")]
    rows = []
    for text in (form for word in words for form in forms(word)):
        row = [repr(text), *([f"{measured.words[text]:,}"] if measured else [])]
        for tokenizer in tokenizers.values():
            ids = tokenizer.encode(text)
            pieces = " | ".join(map(tokenizer.piece, ids))
            row += [str(len(ids)), _printable(pieces), " ".join(map(str, ids))]
        rows.append(row)
    lines = [table(header, rows)]
    for name, tokenizer in tokenizers.items():
        alone, spaced = (
            sum(len(tokenizer.encode(form)) == 1 for form in column) for column in zip(*map(forms, words), strict=True)
        )
        lines.append(
            f"single tokens{f' of {name}' if name else ''}: {spaced} of {len(words)} words after a space, "
            f"{alone} of {len(words)} at a start"
        )
    return "\n".join(lines)


def bytes_table(measured: Measured, tokenizers: Mapping[str, Tokenizer]) -> str:
    """Bytes a token, by source: the more, the shorter is the text to a model."""
    header = ["source", "documents", "bytes"]
    for name, tokenizer in tokenizers.items():
        header += [f"{name} tokens".strip(), f"bytes a token of {tokenizer.vocab_size:,}"]
    totals = sum(measured.sources.values(), Counter[str]())
    sources = sorted(measured.sources.items())
    rows = []
    for source, counts in [*sources, *([("all", totals)] if len(sources) > 1 else [])]:
        row = [source, f"{counts['documents']:,}", f"{counts['bytes']:,}"]
        for name in tokenizers:
            row += [f"{counts[name]:,}", f"{counts['bytes'] / max(counts[name], 1):.3f}"]
        rows.append(row)
    return table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart; those of numbers to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(_width, column)) for column in columns]
    numeric = [all(re.fullmatch(r"[\d,.]+", cell) for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [
            " " * (width - _width(cell)) + cell if right else cell + " " * (width - _width(cell))
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, [header, *rows]))


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _width(text: str) -> int:
    """Columns of a terminal: wide characters take two, and marks on others none."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )
