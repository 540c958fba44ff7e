"""Next-token cross-entropy over the vocabulary."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from biomedlm_jax.model import head_logits


def next_token_loss(
    hidden: Float[Array, "batch seq embd"],
    wte: Float[Array, "vocab embd"],
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    chunk: int = 0,
) -> Float[Array, ""]:
    """Sum over predicted tokens of -log p(token | those before it), in nats.

    Each position predicts the next one; the last of a row predicts nothing, and tokens that `mask` leaves out are
    not predicted. Divide by `target_count` for a mean.

    Args:
      hidden: the model's output before the head.
      wte: the embedding, which is also the head.
      mask: true for tokens, false for padding.
      chunk: positions of a row whose logits exist at once, recomputed for the gradient; 0 is all of them.
    """
    labels = jnp.roll(tokens, -1, axis=1)
    weights = _target_mask(mask)

    def chunk_loss(hidden: Array, labels: Array, weights: Array) -> Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(head_logits(hidden, wte), labels)
        return jnp.sum(losses * weights)

    if not chunk:
        return chunk_loss(hidden, labels, weights)
    # Along the sequence, never the batch: the batch is sharded over devices.
    batch, seq = tokens.shape
    chunks = [
        jnp.moveaxis(x.reshape(batch, seq // chunk, chunk, *x.shape[2:]), 1, 0) for x in (hidden, labels, weights)
    ]
    total, _ = jax.lax.scan(lambda total, xs: (total + jax.checkpoint(chunk_loss)(*xs), None), jnp.float32(0), chunks)
    return total


def target_count(mask: Bool[Array, "batch seq"]) -> Float[Array, ""]:
    """Number of tokens that `next_token_loss` sums over."""
    return jnp.sum(_target_mask(mask), dtype=jnp.float32)


def _target_mask(mask: Bool[Array, "batch seq"]) -> Bool[Array, "batch seq"]:
    """Whether each position's next token is predicted."""
    return jnp.roll(mask, -1, axis=1).at[:, -1].set(False)
