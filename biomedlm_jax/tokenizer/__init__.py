"""Text to token ids and back, losslessly: SentencePiece trained here, and the published model's byte-level BPE.

python -m biomedlm_jax.tokenizer train --input GLOB... --output DIR | inspect DIR WORD... | export DIR --output DIR
"""

from biomedlm_jax.tokenizer.export import export_tokenizer
from biomedlm_jax.tokenizer.models import (
    EOS,
    LONE_SURROGATE,
    ByteLevelTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from biomedlm_jax.tokenizer.training import TRAINING_BYTES, train_tokenizer

__all__ = [
    "EOS",
    "LONE_SURROGATE",
    "TRAINING_BYTES",
    "ByteLevelTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "export_tokenizer",
    "load_tokenizer",
    "train_tokenizer",
]
