"""BioMedLM-style GPT-2 models in JAX: pretrain, fine-tune, evaluate, convert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from biomedlm_jax.load import LanguageModel

__version__ = "0.1.0"


def load_model(
    path: str | Path, step: int | None = None, *, compute_dtype: Literal["float32", "bfloat16"] | None = None
) -> LanguageModel:
    """The model of a run's folder or of a Hugging Face GPT-2 folder: `load_model(path)(tokens) -> logits`.

    See `biomedlm_jax.load.load_model`, which is imported by the first call: the package itself imports nothing heavy.
    """
    from biomedlm_jax import load

    return load.load_model(path, step, compute_dtype=compute_dtype)
