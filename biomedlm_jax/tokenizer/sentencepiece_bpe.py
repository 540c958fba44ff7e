"""SentencePiece BPE with byte fallback, as `train_tokenizer` makes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from biomedlm_jax.errors import UserError
from biomedlm_jax.tokenizer.base import EOS, LONE_SURROGATE, Tokenizer, valid

if TYPE_CHECKING:
    import tokenizers

# Ids before the learnt pieces of a tokenizer trained here: <unk> and the bytes.
FIRST_LEARNT = 1 + 256
# SentencePiece writes a space as U+2581, and so reads this character in a text as a space.
SPACE = "\u2581"
# Parts of a text that SentencePiece may encode one by one: no piece holds a space after its first character, so that
# none reaches over a part's end, and short parts are four times as fast as a whole book.
PARTS = re.compile(f"{SPACE}|[^{SPACE}]{{1,2000}}[^{SPACE} ]*")
# The shortest such parts.
_WORDS = re.compile(" ?[^ ]+| ")
# Of a model with other pieces.
_BETWEEN_SPACES = re.compile(f"{SPACE}|[^{SPACE}]+")
# What SentencePiece must not see.
_NOT_AS_IT_IS = re.compile(f"{SPACE}|{LONE_SURROGATE.pattern}")
# A model may trim, fold or compose characters, or put a space before the text, and then words alone differ.
_PROBE = " \ufb01  A\u030a\t\uff21 "


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
        self.special = {EOS: self.eos_id}
        if self.piece(self.eos_id) != EOS or not self._processor.is_control(self.eos_id):
            raise UserError(
                f"tokenizer.model was not trained by this package: its last piece is "
                f"{self.piece(self.eos_id)}, not {EOS}"
            )
        self._space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        separable = self._processor.normalize(_PROBE) == _PROBE.replace(" ", SPACE) and not any(
            SPACE in self.piece(token)[1:] for token in range(self.vocab_size)
        )
        self._words, self._parts = (_WORDS, PARTS) if separable else (None, _BETWEEN_SPACES)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; the threads share the parts of all texts."""
        split = [self._parts.findall(valid(text)) for text in texts]
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

    def _encode_words(self, words: Sequence[str], threads: int) -> list[list[int]]:
        if _NOT_AS_IT_IS.search("".join(words)):
            return self.encode_batch(words)
        return self._processor.encode(words, num_threads=threads)

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
        if self._words is not None:
            backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_next")
        backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
        backend.add_special_tokens([EOS])
        return backend
