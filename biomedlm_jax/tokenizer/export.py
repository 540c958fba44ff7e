"""A tokenizer as Hugging Face's files."""

from __future__ import annotations

from pathlib import Path

from biomedlm_jax.tokenizer.models import EOS, Tokenizer, json_bytes, write_files


def export_tokenizer(tokenizer: Tokenizer, directory: str | Path, *, model_max_length: int = 1024) -> None:
    """Writes a folder that `transformers.AutoTokenizer` and `load_tokenizer` both read, to the same ids.

    Args:
      tokenizer: either kind.
      directory: folder to write to; may hold a model.
      model_max_length: positions of the model.
    """
    backend = tokenizer.hugging_face()
    # Padding with the end of text needs no new embedding; the attention mask hides it.
    special = {"bos_token": EOS, "eos_token": EOS, "pad_token": EOS}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": model_max_length,
        # The class's default has token_type_ids, which GPT-2 would add to its embeddings.
        "model_input_names": ["input_ids", "attention_mask"],
        # Lossless, and special tokens cannot be smuggled in by texts.
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
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
