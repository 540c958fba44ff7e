"""Tokenizers as folders: ours, GPT-2's, and those that Hugging Face's libraries read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from biomedlm_jax.errors import UserError
from biomedlm_jax.tokenizer.base import EOS, Tokenizer, json_bytes, write_files
from biomedlm_jax.tokenizer.byte_level import ByteLevelTokenizer, json_object, token_ids
from biomedlm_jax.tokenizer.sentencepiece_bpe import SentencePieceTokenizer

# Vocabulary and merges, as Hugging Face and as OpenAI name them.
_BYTE_LEVEL_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder: `tokenizer.model`, as trained here, or GPT-2's kind.

    That is `vocab.json` and `merges.txt`, or `encoder.json` and `vocab.bpe`, as GPT-2's makers call the same.

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
        f"{folder} holds no tokenizer: expected tokenizer.model, or vocab.json and merges.txt, or encoder.json and "
        f"vocab.bpe; found {listing}"
    )


def export_tokenizer(
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    model_max_length: int = 1024,
    added_tokens: Sequence[str] = (),
    truncation_side: str = "right",
) -> None:
    """Writes a folder that `transformers.AutoTokenizer` and `load_tokenizer` both read, to the same ids.

    Args:
      tokenizer: either kind.
      directory: folder to write to; may hold a model.
      model_max_length: positions of the model.
      added_tokens: special tokens of a fine-tuned model, behind all others; found in texts, as its rows need them.
      truncation_side: which end of longer texts a user who asks for it has cut.
    """
    backend = tokenizer.hugging_face()
    backend.add_special_tokens(list(added_tokens))
    # Padding with the end of text needs no new embedding; the attention mask hides it.
    special = {"bos_token": EOS, "eos_token": EOS, "pad_token": EOS}
    own = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special |= {name: token for name, token in own.items() if token in added_tokens}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": model_max_length,
        "truncation_side": truncation_side,
        # The class's default has token_type_ids, which GPT-2 would add to its embeddings.
        "model_input_names": ["input_ids", "attention_mask"],
        # Lossless, and special tokens cannot be smuggled in by texts.
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": not added_tokens,
        "added_tokens_decoder": {
            str(token): {
                "content": added.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token, added in sorted(backend.get_added_tokens_decoder().items())
        },
    }
    write_files(
        directory,
        {
            **tokenizer.files,
            "tokenizer.json": backend.to_str().encode(),
            "tokenizer_config.json": json_bytes(config),
            "special_tokens_map.json": json_bytes(special),
        },
    )


def _added_tokens(folder: Path) -> dict[str, int]:
    """Tokens beside vocab.json: `added_tokens.json` of older transformers, `added_tokens_decoder` of newer ones."""
    added: dict[str, int] = {}
    config: dict = {}
    if (folder / "added_tokens.json").exists():
        added = token_ids((folder / "added_tokens.json").read_bytes(), "added_tokens.json")
    if (folder / "tokenizer_config.json").exists():
        config = json_object((folder / "tokenizer_config.json").read_bytes(), "tokenizer_config.json")
    return added | {entry["content"]: int(token) for token, entry in config.get("added_tokens_decoder", {}).items()}
