"""Texts of evaluation sets in training documents: shared runs of 13 words, as GPT-3 looked for them.

After Brown et al. 2020 (arXiv:2005.14165), appendix C: a document holds an evaluation text if the two share 13 words
in a row. A text of 8 to 12 words must be there as a whole; shorter ones turn up by chance and are not looked for.

Words are maximal runs of letters and digits, without case, accents and Unicode's compatibility forms ("µ" is "μ",
"ﬁ" is "fi"); everything else separates them, so that line ends, dashes and quotation marks make no difference. A
script without spaces has no words in this sense: a set in Chinese is refused for having no texts.

Words and runs are compared by 64-bit hashes: with 10 million runs of evaluation texts and the 25e9 words of The Pile's
PubMed parts, a few percent is the chance that one document of all is taken for contaminated by a collision.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from biomedlm_jax.benchmark_files import records
from biomedlm_jax.corpus import shown
from biomedlm_jax.errors import UserError

N_WORDS = 13
MIN_WORDS = 8
"""Also the length by whose hash most runs of a document are told to be in no evaluation text: `_runs` doubles to it."""

# Bytes hashed at once: what they need stays in a core's cache, and memory is bounded however long a document is. Longer
# words are cut in pieces.
_BLOCK = 1 << 16
# Bits of the prefilter (a Bloom filter with two probes) for each run of words, at least: of the runs in no evaluation
# text, at most 1 in 16 passes the first probe and 1 in 256 both.
_FILTER_BITS = 32
_SECOND_PROBE = np.uint64(0x9E3779B97F4A7C15)

# Multipliers of the hashes of words and of runs: any odd numbers that are 5 modulo 8 do (so that B**i - B**j is
# divisible by few powers of 2); these are pi's and e's digits.
_WORD_BASE = 0x243F6A8885A308D5
_RUN_BASE = 0xADF85458A2BB4A9D


def _powers(base: int) -> np.ndarray:
    factors = np.full(_BLOCK + 1, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


_POWERS = _powers(_WORD_BASE)
_INVERSE_POWERS = _powers(pow(_WORD_BASE, -1, 1 << 64))

# ASCII in lower case, 0 for what separates words; bytes of other characters, which `_fold` leaves, belong to words.
_WORD_BYTES = bytes(i if i >= 0x80 else ord(chr(i).lower()) if chr(i).isalnum() else 0 for i in range(256))
# A word between texts that is in none: UTF-8 has no such byte.
_BOUNDARY = b"\0\xff\0"


class _FoldedCharacters(dict[str, str]):
    def __missing__(self, character: str) -> str:
        folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
        # Accents and invisible characters (soft hyphens) vanish, so that composed and decomposed letters are equal.
        kept = (c for c in folded if unicodedata.category(c)[0] != "M" and unicodedata.category(c) != "Cf")
        self[character] = "".join(c if c.isalnum() else " " for c in kept) if character != "\u200b" else " "
        return self[character]


_FOLDED = _FoldedCharacters()


def _fold(error: UnicodeError) -> tuple[bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(_FOLDED.__getitem__, error.object[error.start : error.end])).encode(), error.end


# The codec finds characters beyond ASCII five times as fast as a regular expression.
codecs.register_error("biomedlm_jax.fold", _fold)


def _words(text: str) -> bytes:
    """The text's words with one or more zero bytes between them."""
    return text.encode("ascii", "biomedlm_jax.fold").translate(_WORD_BYTES)


def _word_hashes(words: bytes) -> Iterator[np.ndarray]:
    """Hashes of words, uint64 [words of a block], block by block."""
    start = 0
    while start < len(words):
        end = start + _BLOCK
        if end < len(words):
            end = words.rfind(b"\0", start, end) + 1 or end
        yield _block_hashes(words[start:end])
        start = end


def _block_hashes(words: bytes) -> np.ndarray:
    """Each word's sum of byte[k] * base**k modulo 2**64, mixed."""
    data = np.frombuffer(b"\0" + words + b"\0", np.uint8)
    in_word = data != 0
    edges = np.flatnonzero(in_word[1:] != in_word[:-1])
    starts, ends = edges[::2], edges[1::2]
    sums = np.empty(len(data) - 1, np.uint64)
    sums[0] = 0
    np.cumsum(data[1:-1] * _POWERS[: len(words)], out=sums[1:])
    hashes = (sums[ends] - sums[starts]) * _INVERSE_POWERS[starts]
    # The finaliser of SplitMix64, which is one to one: similar words get unrelated hashes.
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    return hashes


_BOUNDARY_HASH = _block_hashes(_BOUNDARY)[0]


def _runs(hashes: np.ndarray) -> np.ndarray:
    """Hashes of the runs of MIN_WORDS words at each word, [words - MIN_WORDS + 1]: base**7 * word 0 + ... + word 7."""
    width = 1
    while width < MIN_WORDS:
        hashes = hashes[:-width] * np.uint64(pow(_RUN_BASE, width, 1 << 64)) + hashes[width:]
        width *= 2
    return hashes


def _longer_runs(runs: np.ndarray, words: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """For each length from MIN_WORDS to N_WORDS the hashes of the runs at some words.

    Args:
      runs: those of MIN_WORDS at `starts`.
      words: hashes of words, with N_WORDS - MIN_WORDS more behind the last run.
      starts: indices into `words`.
    """
    yield MIN_WORDS, runs
    for length in range(MIN_WORDS + 1, N_WORDS + 1):
        runs = runs * np.uint64(_RUN_BASE) + words[starts + (length - 1)]
        yield length, runs


@dataclass(frozen=True, slots=True)
class BenchmarkText:
    """A text of an evaluation set."""

    file: str
    record: str
    """Number of the line or row, from 1, or key of the record."""
    sample: str
    """Its beginning, for people."""

    @property
    def place(self) -> str:
        """Where it is, as "file:record"."""
        return f"{self.file}:{self.record}"


@dataclass
class FileCounts:
    """What one file of an evaluation set holds."""

    records: int = 0
    texts: int = 0
    """Strings that are looked for."""
    too_short: int = 0
    """Strings of fewer than MIN_WORDS words."""
    records_without_texts: int = 0
    """Records of which nothing is looked for."""


@dataclass(frozen=True, eq=False, repr=False)
class Benchmarks:
    """The runs of words of evaluation texts; may be pickled."""

    texts: list[BenchmarkText]
    """By id."""
    files: dict[str, FileCounts]
    fingerprint: str
    """Hash of all runs, whatever the order of files: with the same, the same documents are contaminated."""
    _keys: np.ndarray
    """Sorted hashes of runs, uint64 [runs]."""
    _owners: np.ndarray
    """The text of each, int32 [runs]."""
    _lengths: frozenset[int]
    """The lengths of runs that occur."""
    _filter: np.ndarray
    """Bits, uint8 [a power of 2], that are set at the hashes of the first MIN_WORDS words of the runs."""

    def find(self, text: str) -> list[int]:
        """Ids of the evaluation texts that a document holds, sorted; none if it is clean."""
        return self.find_all([text])[0]

    def find_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`find` for each of many documents: several times as fast for some hundred short ones."""
        found: list[set[int]] = [set() for _ in texts]
        boundaries = [np.empty(0, np.int64)]
        places, owners = [], []
        # Words before those at hand, and the last of them, with which the next runs begin.
        seen, before = 0, np.empty(0, np.uint64)
        for block in _word_hashes(_BOUNDARY.join(map(_words, texts))):
            boundaries.append(np.flatnonzero(block == _BOUNDARY_HASH) + seen)
            hashes = np.concatenate([before, block])
            for starts, ids in self._matches(hashes):
                places.append(starts + (seen - len(before)))
                owners.append(ids)
            seen += len(block)
            before = hashes[-(N_WORDS - 1) :]
        if places:
            documents = np.searchsorted(np.concatenate(boundaries), np.concatenate(places))
            for document, owner in zip(documents.tolist(), np.concatenate(owners).tolist(), strict=True):
                found[document].add(owner)
        return [sorted(ids) for ids in found]

    def _matches(self, words: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Runs of words in evaluation texts: the index of their first word and the text's id, [matches] each."""
        if len(words) < MIN_WORDS:
            return
        runs = _runs(words)
        starts = _may_hold(self._filter, runs)
        if not len(starts):
            return
        words = np.append(words, np.zeros(N_WORDS - MIN_WORDS, np.uint64))
        for length, hashes in _longer_runs(runs[starts], words, starts):
            if length not in self._lengths:
                continue
            first = np.searchsorted(self._keys, hashes)
            equal = self._keys[np.minimum(first, len(self._keys) - 1)] == hashes
            if equal.any():
                counts = np.searchsorted(self._keys, hashes[equal], "right") - first[equal]
                nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
                yield np.repeat(starts[equal], counts), self._owners[np.repeat(first[equal], counts) + nth]

    def digest(self) -> str:
        """Hash of all that `find` depends on, the order and the places of the texts as well."""
        places = json.dumps([text.place for text in self.texts]).encode()
        return hashlib.sha256(places + self._keys.tobytes() + self._owners.tobytes()).hexdigest()

    def report(self) -> dict[str, Any]:
        """What was read, as JSON can hold it."""
        return {
            "n_words": N_WORDS,
            "min_words": MIN_WORDS,
            "texts": len(self.texts),
            "fingerprint": self.fingerprint,
            "files": {file: dict(vars(counts)) for file, counts in self.files.items()},
        }


def _filter_places(bits: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Byte and bit of hashes in a filter: their upper bits tell."""
    places = (hashes >> np.uint64(64 - (8 * len(bits)).bit_length() + 1)).view(np.int64)
    return places >> 3, (places & 7).astype(np.uint8)


def _may_hold(bits: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Indices of the hashes that may have been put into a filter."""
    places, shifts = _filter_places(bits, hashes)
    once = np.flatnonzero((bits[places] >> shifts) & 1)
    places, shifts = _filter_places(bits, hashes[once] * _SECOND_PROBE)
    return once[((bits[places] >> shifts) & 1) != 0]


def _put(bits: np.ndarray, hashes: np.ndarray) -> None:
    for probe in hashes, hashes * _SECOND_PROBE:
        places, shifts = _filter_places(bits, probe)
        np.bitwise_or.at(bits, places, np.left_shift(np.uint8(1), shifts))


def read_benchmarks(files: Sequence[str]) -> Benchmarks:
    """Reads evaluation sets: every string of their records that has at least MIN_WORDS words is a text to look for.

    Args:
      files: paths, as from `corpus.expand_globs`, of the formats of `benchmark_files.records`.

    Raises:
      UserError: a broken record, another format, or a file with no text long enough; names the file and its line.
    """
    texts: list[BenchmarkText] = []
    words: list[bytes] = []
    counts: dict[str, FileCounts] = {}
    for file in files:
        counts[file] = count = FileCounts()
        for name, record in records(file):
            count.records += 1
            texts_before = count.texts
            for string in _strings(record):
                found = _words(string)
                split = found.split(b"\0")
                n_words = len(split) - split.count(b"")
                if n_words >= MIN_WORDS:
                    count.texts += 1
                    texts.append(BenchmarkText(file, name, " ".join(string[:200].split())[:100]))
                    words.append(found)
                elif n_words:
                    count.too_short += 1
            count.records_without_texts += count.texts == texts_before
        if not count.texts:
            raise UserError(
                f"{shown(file)} has no text of at least {MIN_WORDS} words in its {count.records} records, so there is "
                "nothing to look for: leave it out"
            )
    return _index(words, texts, counts)


def _index(words: list[bytes], texts: list[BenchmarkText], files: dict[str, FileCounts]) -> Benchmarks:
    hashes = np.concatenate([*_word_hashes(_BOUNDARY.join([*words, b""])), np.zeros(N_WORDS, np.uint64)])
    boundaries = np.flatnonzero(hashes == _BOUNDARY_HASH)
    sizes = np.diff(boundaries, prepend=-1) - 1
    # Each text has size - length + 1 runs, which begin at its first words.
    run_lengths = np.minimum(sizes, N_WORDS)
    run_counts = sizes - run_lengths + 1
    owners = np.repeat(np.arange(len(texts), dtype=np.int32), run_counts)
    nth_run = np.arange(len(owners)) - np.repeat(np.cumsum(run_counts) - run_counts, run_counts)
    starts = (boundaries - sizes)[owners] + nth_run
    lengths = run_lengths[owners]

    prefixes = _runs(hashes)[starts]
    keys = np.empty(len(starts), np.uint64)
    for length, runs in _longer_runs(prefixes, hashes, starts):
        keys[lengths == length] = runs[lengths == length]
    order = np.lexsort((owners, keys))
    keys, owners = keys[order], owners[order]
    once = np.ones(len(keys), bool)
    once[1:] = (keys[1:] != keys[:-1]) | (owners[1:] != owners[:-1])
    keys, owners = keys[once], owners[once]

    bits = np.zeros(1 << max(len(keys) * _FILTER_BITS // 8, 1).bit_length(), np.uint8)
    _put(bits, prefixes)
    fingerprint = hashlib.sha256(np.unique(keys).astype("<u8").tobytes()).hexdigest()
    return Benchmarks(texts, files, fingerprint, keys, owners, frozenset(lengths.tolist()), bits)


def _strings(record: Any) -> Iterator[str]:
    """The strings in a record, in their order; keys are none."""
    pending = [record]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending += reversed(value.values())
        elif isinstance(value, list | tuple):
            pending += reversed(value)
