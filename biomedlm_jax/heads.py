"""Answers to questions: one row for each choice, or one for a text, scored at its last token by a linear head.

BioMedLM's heads for multiple choice (a score a choice) and for classification (a score a label) are one function here.
The bias that its multiple choice adds to all scores alike is left out: no softmax over choices sees it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from biomedlm_jax import model as model_lib
from biomedlm_jax import step
from biomedlm_jax.config import ModelConfig
from biomedlm_jax.finetune_config import FinetuneConfig, LoraConfig
from biomedlm_jax.model import Params
from biomedlm_jax.step import Gather, Objective


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Questions:
    """A batch of questions.

    Attributes:
      tokens: padded on the right with any ids; no token sees what is behind it.
      lengths: of rows without padding; 0 for a choice that there is not.
      labels: which choice, or which label, is right.
      weights: 1, or 0 for questions that fill up a batch.
    """

    tokens: Int[Array, "batch choices seq"]
    lengths: Int[Array, "batch choices"]
    labels: Int[Array, "batch"]
    weights: Float[Array, "batch"]


def scores(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch choices seq"],
    lengths: Int[Array, "batch choices"],
    *,
    lora: LoraConfig | None = None,
    dropout_keys: Key[Array, "batch"] | None = None,
    gather: Gather | None = None,
) -> Float[Array, "batch answers"]:
    """A score for each choice, or for each label where there is one row only: unnormalised log probabilities, float32.

    Args:
      params: with the head, [embd, scores of a row], as score/kernel.
    """
    batch, choices, seq = tokens.shape
    keys = dropout_keys
    if keys is not None:
        keys = jax.vmap(lambda key: jax.random.split(key, choices))(keys).reshape(-1)
    model = model_lib.merge(config, without_head(params), lora)
    hidden = model.hidden_states(tokens.reshape(-1, seq), dropout_keys=keys, gather=gather)
    last = jnp.maximum(lengths.reshape(-1) - 1, 0)
    pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    by_row = (pooled @ params["score"]["kernel"]).reshape(batch, choices, -1)
    return jnp.where(lengths[:, :, None] > 0, by_row, jnp.finfo(jnp.float32).min).reshape(batch, -1)


def without_head(params: Params) -> Params:
    """The parameters of the language model alone."""
    return {name: part for name, part in params.items() if name != "score"}


def objective(config: ModelConfig, lora: LoraConfig | None = None) -> Objective:
    """The cross-entropy of the right answers of `Questions`."""

    def summed_loss(params: Params, batch: Questions, keys: Any, gather: Gather | None) -> Float[Array, ""]:
        logits = scores(config, params, batch.tokens, batch.lengths, lora=lora, dropout_keys=keys, gather=gather)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.sum(losses * batch.weights)

    return Objective(summed_loss, lambda batch: jnp.sum(batch.weights))


def init_head(config: ModelConfig, answers: int, seed: int) -> Params:
    """A new head, N(0, initializer_range) as transformers': a score for each of so many answers of a row."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return {"score": {"kernel": config.initializer_range * jax.random.normal(key, (config.n_embd, answers))}}


def jit_scores(config: FinetuneConfig, mesh: Mesh, lora: LoraConfig | None = None) -> Any:
    """`scores` of `Questions`, compiled as `step.jit_rows` does."""

    def of_batch(params: Params, batch: Questions, gather: Gather) -> Float[Array, "batch answers"]:
        return scores(config.model, params, batch.tokens, batch.lengths, lora=lora, gather=gather)

    return step.jit_rows(config, mesh, of_batch)
