"""The two kinds of tokenizers: SentencePiece as trained here, and GPT-2's byte-level BPE."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt

from biomedlm_jax.errors import UserError
from biomedlm_jax.files import replace_file

if TYPE_CHECKING:
    import tokenizers

EOS = "<|endoftext|>"
# Ids before the learnt pieces of a tokenizer trained here: <unk> and the bytes.
FIRST_LEARNT = 1 + 256
# SentencePiece writes a space as U+2581, and so reads this character in a text as a space.
SPACE = "\u2581"
# Parts of a text that SentencePiece may encode one by one: no piece holds a space after its first character, so that
# none reaches over a part's end, and short parts are four times as fast as a whole book.
_LONG_PART = 2000
PARTS = re.compile(f"{SPACE}|[^{SPACE}]{{1,{_LONG_PART}}}[^{SPACE} ]*")
# Words that a process remembers, with what they become: 150 MB.
_MAX_WORDS = 500_000
_LONGEST_WORD = 64
_BYTE_LEVEL_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
# JSON escapes can spell half of a surrogate pair, which no UTF-8 and no tokenizer can hold.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer(ABC):
    """What both kinds share. Picklable; equal fingerprints mean equal ids.

    Attributes:
      files: the files that `load_tokenizer` reads, by name.
      vocab_size: number of ids.
      eos_id: id of `<|endoftext|>`, which no text encodes to.
      fingerprint: SHA-256 of the files, in hexadecimal.
    """

    vocab_size: int
    eos_id: int

    def __init__(self, files: Mapping[str, bytes]):
        self.files = dict(files)
        digests = [f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(files.items())]
        self.fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in threads."""

    def encode_array(self, texts: Sequence[str]) -> UInt[np.ndarray, " tokens"]:
        """The ids of all texts one after the other, each followed by `eos_id`: what rows are made of.

        Returns:
          uint16, or uint32 where the vocabulary needs it.
        """
        ids = [np.asarray([*ids, self.eos_id], self.dtype) for ids in self.encode_batch(texts)]
        return np.concatenate(ids) if ids else np.empty(0, self.dtype)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest type that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

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


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece BPE with byte fallback, as `train_tokenizer` makes it: <unk>, bytes, pieces, `<|endoftext|>`."""

    def __init__(self, model: bytes):
        """Raises: UserError: `model` is not of `train_tokenizer`."""
        import sentencepiece

        super().__init__({"tokenizer.model": model})
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"tokenizer.model is no SentencePiece model: {error}") from error
        self.vocab_size = self._processor.get_piece_size()
        self.eos_id = self.vocab_size - 1
        if self.piece(self.eos_id) != EOS or not self._processor.is_control(self.eos_id):
            raise UserError(
                f"tokenizer.model was not trained by this package: its last piece is "
                f"{self.piece(self.eos_id)}, not {EOS}"
            )
        # By word, what stands for a space and the word; by space and word, what stands for the word alone.
        self._words: dict[str, bytes] = {}
        self._words_are_apart = not any(
            re.search(f"(?s).[ {SPACE}]", self.piece(token))
            for token in range(self.eos_id)
            if not self._processor.is_unused(token)
        )
        self._space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; the threads share the parts of all texts."""
        split = [PARTS.findall(valid(text)) for text in texts]
        encoded = iter(self._processor.encode(list(chain.from_iterable(split))))
        # zip asks for a part first, so that it takes no text's ids too many.
        return [
            list(
                chain.from_iterable(
                    self._space_bytes if part == SPACE else ids for part, ids in zip(parts, encoded, strict=False)
                )
            )
            for parts in split
        ]

    def encode_array(self, texts: Sequence[str]) -> UInt[np.ndarray, " tokens"]:
        """`Tokenizer.encode_array`, several times as fast as `encode_batch`, and on one core.

        No piece holds a space after its first character, so that what a word becomes depends on nothing around it: it
        is encoded once, with all others that are new in `texts`.
        """
        if not self._words_are_apart:
            return super().encode_array(texts)
        split = [valid(text).split(" ") for text in texts]
        for words in split:
            words[0] = " " + words[0]
        known = self._words
        if len(known) > _MAX_WORDS:
            known.clear()
        new = list(set(chain.from_iterable(split)).difference(known))
        parts = [word[1:] if word[:1] == " " else " " + word for word in new]
        # Nearly all are plain words, which need not be taken apart.
        plain = max(map(len, parts), default=0) < _LONG_PART and not any(SPACE in part for part in parts)
        encoded = self._processor.encode(parts) if plain else self.encode_batch(parts)
        found = {word: np.asarray(ids, self.dtype).tobytes() for word, ids in zip(new, encoded, strict=True)}
        known.update(found)
        eos = np.asarray([self.eos_id], self.dtype).tobytes()
        ids = b"".join(b"".join(map(known.__getitem__, words)) + eos for words in split)
        for word in new:
            if len(word) > _LONGEST_WORD:
                del known[word]
        return np.frombuffer(ids, self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_words": {}}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self._processor.decode([int(token) for token in ids])

    def piece(self, token: int) -> str:
        """SentencePiece's way to write a token: U+2581 is a space, <0x0A> a byte."""
        return self._processor.id_to_piece(int(token))

    def hugging_face(self) -> tokenizers.Tokenizer:
        """SentencePiece's ids from the `tokenizers` library.

        Merges are all splits of each piece into two, in the order in which SentencePiece merges. Pieces hold true
        spaces, unlike SentencePiece's, so that U+2581 is a character like any other.
        """
        import tokenizers

        pieces = [self.piece(token).replace(SPACE, " ") for token in range(self.vocab_size)]
        learnt = {
            pieces[token]: token for token in range(FIRST_LEARNT, self.eos_id) if not self._processor.is_unused(token)
        }
        merges = sorted(
            (-self._processor.get_score(token), learnt[piece[:cut]], learnt[piece[cut:]], piece[:cut], piece[cut:])
            for piece, token in learnt.items()
            for cut in range(1, len(piece))
            if piece[:cut] in learnt and piece[cut:] in learnt
        )
        backend = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                {piece: token for token, piece in enumerate(pieces)},
                [merge[-2:] for merge in merges],
                unk_token=pieces[0],
                byte_fallback=True,
                fuse_unk=False,
            )
        )
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_next")
        backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
        backend.add_special_tokens([EOS])
        return backend


class ByteLevelTokenizer(Tokenizer):
    """GPT-2's byte-level BPE, which the published BioMedLM uses."""

    def __init__(self, vocab: bytes, merges: bytes, added: Mapping[str, int]):
        """Args:
          vocab: contents of vocab.json.
          merges: contents of merges.txt.
          added: ids of tokens that no text encodes to, such as `<|endoftext|>`, which gets the next id if it has none.

        Raises:
          UserError: the three contradict each other, or cannot encode every text.
        """
        import tokenizers

        words = _token_ids(vocab, "vocab.json")
        special = {EOS: words.get(EOS, len({**words, **added})), **added}
        self._special = {name: special[name] for name in sorted(special, key=special.__getitem__)}
        super().__init__({"vocab.json": vocab, "merges.txt": merges, "added_tokens.json": json_bytes(self._special)})
        ids = {**words, **self._special}
        self.vocab_size, self.eos_id = len(ids), self._special[EOS]
        if sorted(ids.values()) != list(range(self.vocab_size)):
            raise UserError(f"vocab.json and the added tokens do not number their {self.vocab_size} tokens from 0 on")
        missing = [symbol for symbol in tokenizers.pre_tokenizers.ByteLevel.alphabet() if symbol not in words]
        if missing:
            raise UserError(f"vocab.json lacks {len(missing)} of the 256 symbols of bytes: not GPT-2's kind")
        lines = merges.decode("utf-8", "replace").splitlines()
        # Only the first line can be a comment: "# #" is a merge.
        pairs = [
            tuple(line.split(" "))
            for index, line in enumerate(lines)
            if line and not (index == 0 and line.startswith("#version"))
        ]
        try:
            self._backend = tokenizers.Tokenizer(tokenizers.models.BPE(words, pairs))  # type: ignore[arg-type]
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"merges.txt does not fit vocab.json: {error}") from error
        self._backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._backend.decoder = tokenizers.decoders.ByteLevel()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in threads."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast([valid(text) for text in texts])]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        special = self._special.values()
        return self._backend.decode([int(token) for token in ids if token not in special])

    def piece(self, token: int) -> str:
        """GPT-2's way to write a token: each character stands for a byte, `Ġ` for a space."""
        special = {number: name for name, number in self._special.items()}
        return special.get(token) or self._backend.id_to_token(token) or ""

    def hugging_face(self) -> tokenizers.Tokenizer:
        """The same model, which also knows its special tokens."""
        import tokenizers

        # A copy: the one that encodes must not know special tokens, or it would find them in texts.
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_special_tokens(list(self._special))
        return backend


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder: `tokenizer.model`, as trained here, or GPT-2's `vocab.json` and `merges.txt`.

    OpenAI's own names of the latter, `encoder.json` and `vocab.bpe`, will do, too.

    Raises:
      UserError: there is no such folder, it holds neither, or its files are broken.
    """
    folder = Path(path)
    if not folder.is_dir():
        reason = "is a file, not the folder of a tokenizer" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {reason}")
    try:
        if (folder / "tokenizer.model").exists():
            return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes())
        for vocab, merges in _BYTE_LEVEL_FILES:
            if (folder / vocab).exists() and (folder / merges).exists():
                return ByteLevelTokenizer(
                    (folder / vocab).read_bytes(), (folder / merges).read_bytes(), _added_tokens(folder)
                )
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    found = sorted(entry.name for entry in folder.iterdir())
    listing = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "") if found else "nothing"
    raise UserError(
        f"{folder} holds no tokenizer: expected tokenizer.model, or vocab.json and merges.txt; found {listing}"
    )


def valid(text: str) -> str:
    """The text without what no UTF-8 can hold."""
    return LONE_SURROGATE.sub("\ufffd", text)


def json_bytes(value: object) -> bytes:
    """A file of JSON, for people too."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _json_object(content: bytes, name: str) -> dict:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} is not a JSON object")
    return value


def _token_ids(content: bytes, name: str) -> dict[str, int]:
    ids = _json_object(content, name)
    if not all(type(token) is int for token in ids.values()):
        raise UserError(f"{name} does not map tokens to numbers")
    return ids


def _added_tokens(folder: Path) -> dict[str, int]:
    """Tokens beside vocab.json: `added_tokens.json` of older transformers, `added_tokens_decoder` of newer ones."""
    added: dict[str, int] = {}
    config: dict = {}
    if (folder / "added_tokens.json").exists():
        added = _token_ids((folder / "added_tokens.json").read_bytes(), "added_tokens.json")
    if (folder / "tokenizer_config.json").exists():
        config = _json_object((folder / "tokenizer_config.json").read_bytes(), "tokenizer_config.json")
    return added | {entry["content"]: int(token) for token, entry in config.get("added_tokens_decoder", {}).items()}


def write_files(directory: str | Path, files: Mapping[str, bytes]) -> None:
    """Writes files by name, each complete or not at all."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        replace_file(Path(directory, name), content)
