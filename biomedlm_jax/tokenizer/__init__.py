"""Text to token ids and back, losslessly: SentencePiece trained here, and the published model's byte-level BPE.

python -m biomedlm_jax.tokenizer train   --input GLOB... --output DIR [--vocab-size 28896]
                                 inspect DIR WORD... [--gpt2 DIR] [--data GLOB...]
                                 export  DIR --output DIR
"""

from biomedlm_jax.tokenizer.base import EOS, LONE_SURROGATE, Tokenizer
from biomedlm_jax.tokenizer.byte_level import ByteLevelTokenizer
from biomedlm_jax.tokenizer.folders import export_tokenizer, load_tokenizer
from biomedlm_jax.tokenizer.sentencepiece_bpe import SentencePieceTokenizer
from biomedlm_jax.tokenizer.training import PUBLISHED_VOCAB_SIZE, TRAINING_BYTES, train_tokenizer

__all__ = [
    "EOS",
    "LONE_SURROGATE",
    "PUBLISHED_VOCAB_SIZE",
    "TRAINING_BYTES",
    "ByteLevelTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "export_tokenizer",
    "load_tokenizer",
    "train_tokenizer",
]
