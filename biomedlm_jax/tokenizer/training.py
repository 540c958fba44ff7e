"""Trains SentencePiece on text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from biomedlm_jax.errors import UserError
from biomedlm_jax.tokenizer.base import EOS, Tokenizer, valid
from biomedlm_jax.tokenizer.sentencepiece_bpe import FIRST_LEARNT, PARTS, SPACE, SentencePieceTokenizer

PUBLISHED_VOCAB_SIZE = 28_896  # https://huggingface.co/stanford-crfm/BioMedLM
# Text to train on: a minute, and 1.4 GB of memory.
TRAINING_BYTES = 400_000_000
# Training drops a sentence that holds NUL or U+2585.
_SENTENCE_ENDS = re.compile(f"[\n\0\u2585{SPACE}]")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, directory: str | Path, *, max_bytes: int = TRAINING_BYTES
) -> Tokenizer:
    """Trains SentencePiece BPE and writes `tokenizer.model`, complete or not at all. Deterministic.

    Args:
      texts: the corpus, in an order whose beginning stands for the whole.
      vocab_size: number of ids; where the corpus yields fewer pieces, the rest is never used.
      directory: folder to write to.
      max_bytes: bytes of UTF-8 after which no more text is read; the default takes a minute and 1.4 GB of memory.

    Raises:
      UserError: the corpus is empty, or `vocab_size` leaves no room for its characters.
    """
    import sentencepiece

    if vocab_size <= FIRST_LEARNT + 1:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes, <unk> and {EOS} "
            f"leave no room for the corpus's characters"
        )
    sentences = _Sentences(texts, max_bytes)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            minloglevel=2,
            model_type="bpe",
            vocab_size=vocab_size - 1,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            byte_fallback=True,
            character_coverage=0.9999,
            # Lossless: the text as it is.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # By default no piece could hold "Immunohistochemistry", and long lines would be dropped without a word.
            max_sentencepiece_length=32,
            max_sentence_length=1 << 20,
            # A small corpus cannot fill the vocabulary.
            hard_vocab_limit=False,
        )
    except RuntimeError as error:
        if sentences.failure:
            raise sentences.failure from None
        if not sentences.bytes_read:
            raise UserError("the corpus to train a tokenizer on is empty") from error
        too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if too_small:
            raise UserError(
                f"a vocabulary of {vocab_size} is too small for the characters of this corpus: "
                f"it takes {int(too_small[1]) + 1} or more"
            ) from error
        raise UserError(f"SentencePiece cannot be trained on this corpus: {error}") from error
    tokenizer = SentencePieceTokenizer(_complete(model.getvalue(), vocab_size))
    tokenizer.save(directory)
    return tokenizer


class _Sentences:
    """The corpus as SentencePiece wants it: lines, in which it finds no character that it reserves."""

    def __init__(self, texts: Iterable[str], max_bytes: int):
        self.texts, self.max_bytes = texts, max_bytes
        self.bytes_read = 0
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in map(valid, self.texts):
                for line in _SENTENCE_ENDS.split(text):
                    yield from PARTS.findall(line)
                self.bytes_read += len(text.encode())
                if self.bytes_read >= self.max_bytes:
                    return
        except (Exception, KeyboardInterrupt) as error:  # SentencePiece makes a RuntimeError of it
            self.failure = error
            raise


def _complete(model: bytes, vocab_size: int) -> bytes:
    """The model with never used pieces up to `vocab_size`, and the end of text as the last id."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    kinds = proto.SentencePiece.Type
    for index in range(vocab_size - 1 - len(proto.pieces)):
        # A true space is in no text that SentencePiece sees: it cannot merge its way to such a piece.
        proto.pieces.add(piece=f"<unused {index}>", type=kinds.UNUSED)
    proto.pieces.add(piece=EOS, type=kinds.CONTROL)
    proto.trainer_spec.eos_piece = EOS
    # What `decode` makes of <unk>, which no text encodes to: the same as Hugging Face.
    proto.trainer_spec.unk_surface = "<unk>"
    return proto.SerializeToString(deterministic=True)
