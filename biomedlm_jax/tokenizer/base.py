"""What the two kinds of tokenizer share, and the cache of words by which whole corpora are encoded."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedlm_jax.files import replace_file

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

EOS = "<|endoftext|>"
# JSON escapes can spell half of a surrogate pair, which no UTF-8 and no tokenizer can hold.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# About 70 MB in each process that encodes, at 143 bytes a word.
_CACHED_WORDS = 500_000
# Longer ones are sequences, addresses and tables, which hardly come twice.
_CACHED_LENGTH = 40


class Tokenizer(ABC):
    """What both kinds share. Picklable; equal fingerprints mean equal ids.

    Attributes:
      files: the files that `load_tokenizer` reads, by name.
      vocab_size: number of ids.
      eos_id: id of `<|endoftext|>`, which no text encodes to.
      special: ids of it and of other tokens that no text encodes to, by name.
      fingerprint: SHA-256 of the files, in hexadecimal.
    """

    vocab_size: int
    eos_id: int
    special: Mapping[str, int]
    _words: re.Pattern[str] | None = None
    """Finds the parts of a text, all of it in order, over whose ends no token reaches; None: there are no such."""

    def __init__(self, files: Mapping[str, bytes]):
        self.files = dict(files)
        digests = [f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(files.items())]
        self.fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()
        self._empty_cache()

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in threads."""

    def encode_array(self, texts: Sequence[str], *, threads: int = 1) -> np.ndarray:
        """The ids of all texts, each followed by `eos_id`: much faster than `encode_batch`, for corpora.

        The ids of words that have come before are looked up, so that the tokenizer's library sees new ones only.

        Args:
          texts: at most some MB at a time: the words of all are in memory, at ten times their size.
          threads: for new words; not of byte-level tokenizers, whose library has its own, of RAYON_NUM_THREADS.

        Returns:
          [tokens], of uint16, or uint32 where the vocabulary needs it.
        """
        import numpy as np

        code = self._array_code
        if self._words is None:
            encoded = self.encode_batch(texts)
            return np.array([id_ for ids in encoded for id_ in (*ids, self.eos_id)], dtype=code)
        split = list(map(self._words.findall, texts))
        end = array(code, [self.eos_id]).tobytes()
        with self._lock:
            cache = self._cache
            new = list(set().union(*split).difference(cache))
            if new:
                cache.update(
                    (word, array(code, ids).tobytes())
                    for word, ids in zip(new, self._encode_words(new, threads), strict=True)
                )
            packed = chain.from_iterable(chain(map(cache.__getitem__, words), [end]) for words in split)
            array_ids = np.frombuffer(bytearray().join(packed), dtype=code)
            self._shrink_cache(new)
        return array_ids

    @property
    def _array_code(self) -> str:
        """`id_code` of this vocabulary."""
        return id_code(self.vocab_size)

    def _encode_words(self, words: Sequence[str], threads: int) -> list[list[int]]:
        """`encode` of each of what `_words` finds."""
        return self.encode_batch(words)

    def _empty_cache(self) -> None:
        # A plain dict: of another, even a subclass, `set.difference` would look at each word.
        self._cache: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def _shrink_cache(self, new: Sequence[str]) -> None:
        """Lets long new words go, and, when it is full, the newest half: frequent words came early, and so stay."""
        for word in new:
            if len(word) > _CACHED_LENGTH:
                del self._cache[word]
        if len(self._cache) > _CACHED_WORDS:
            while len(self._cache) > _CACHED_WORDS // 2:
                self._cache.popitem()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_cache", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._empty_cache()

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens have none. Bytes that are no UTF-8 become U+FFFD.

        Only there, in what a model makes up, can Hugging Face's text differ: SentencePiece loses fewer bytes.
        """

    @abstractmethod
    def piece(self, token: int) -> str:
        """How the vocabulary writes a token."""

    @abstractmethod
    def hugging_face(self) -> tokenizers.Tokenizer:
        """The same tokenizer in the form of a Hugging Face `tokenizer.json`."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, which `decode` turns back into it.

        Nothing is added, `<|endoftext|>` in the text is plain text, and lone surrogates become U+FFFD.
        """
        return self.encode_batch([text])[0]

    def save(self, directory: str | Path) -> None:
        """Writes the files that `load_tokenizer` reads."""
        write_files(directory, self.files)


def id_code(vocab_size: int) -> str:
    """The smallest unsigned integer that holds every id, as `array` and NumPy name it."""
    return "H" if vocab_size <= 1 << 16 else "I"


def valid(text: str) -> str:
    """The text without lone surrogates."""
    return LONE_SURROGATE.sub("\ufffd", text)


def json_bytes(value: object) -> bytes:
    """JSON for people to read."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_files(directory: str | Path, files: Mapping[str, bytes]) -> None:
    """Writes files into a folder, each of them whole or not at all."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        replace_file(Path(directory, name), content)
