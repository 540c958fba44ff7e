"""GPT-2's byte-level BPE, which the published BioMedLM uses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from biomedlm_jax.errors import UserError
from biomedlm_jax.tokenizer.base import EOS, Tokenizer, json_bytes, valid

if TYPE_CHECKING:
    import tokenizers

# Parts of a text, each from a space after no whitespace to the next such: GPT-2 has its tokens begin there, but
# treats whitespace by what comes after all of it.
_WORDS = re.compile(r" ?[^ ]*(?:(?<!\S) +[^ ]*)*")


def json_object(content: bytes, name: str) -> dict:
    """The object of a JSON file. Raises: UserError: it is none."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} is not a JSON object")
    return value


def token_ids(content: bytes, name: str) -> dict[str, int]:
    """The ids of a JSON file by their tokens. Raises: UserError: it holds other things."""
    ids = json_object(content, name)
    if not all(type(token) is int for token in ids.values()):
        raise UserError(f"{name} does not map tokens to numbers")
    return ids


class ByteLevelTokenizer(Tokenizer):
    """Of GPT-2's kind: the symbols of a vocabulary stand for bytes, and merges join them."""

    _words = _WORDS

    def __init__(self, vocab: bytes, merges: bytes, added: Mapping[str, int]):
        """Args:
          vocab: contents of vocab.json.
          merges: contents of merges.txt.
          added: ids of tokens that no text encodes to, such as `<|endoftext|>`, which gets the next id if it has none.

        Raises:
          UserError: the three contradict each other, or cannot encode every text.
        """
        import tokenizers

        words = token_ids(vocab, "vocab.json")
        special = {EOS: words.get(EOS, len({**words, **added})), **added}
        self.special = {name: special[name] for name in sorted(special, key=special.__getitem__)}
        super().__init__({"vocab.json": vocab, "merges.txt": merges, "added_tokens.json": json_bytes(self.special)})
        ids = {**words, **self.special}
        self.vocab_size, self.eos_id = len(ids), self.special[EOS]
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
        special = self.special.values()
        return self._backend.decode([int(token) for token in ids if token not in special])

    def piece(self, token: int) -> str:
        """GPT-2's way to write a token: each character stands for a byte, `Ġ` for a space."""
        special = {number: name for name, number in self.special.items()}
        return special.get(token) or self._backend.id_to_token(token) or ""

    def hugging_face(self) -> tokenizers.Tokenizer:
        """The same model, which also knows its special tokens."""
        import tokenizers

        # A copy: the one that encodes must not know special tokens, or it would find them in texts.
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_special_tokens(list(self.special))
        return backend
