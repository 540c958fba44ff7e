"""Next-token cross-entropy over the vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.custom_vjp
def head_logits(hidden: Float[Array, "*batch embd"], wte: Float[Array, "vocab embd"]) -> Float[Array, "*batch vocab"]:
    """Logits from the tied head, accumulated in float32 from operands of `hidden`'s type.

    The gradient's products take operands of that type, too: float32 times bfloat16 is no product that GPUs have.
    """
    return jnp.einsum("...e,ve->...v", hidden, wte.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _head_logits_forward(hidden: Array, wte: Array) -> tuple[Array, tuple[Array, Array]]:
    return head_logits(hidden, wte), (hidden, wte)


def _head_logits_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    hidden, wte = residuals
    gradient = gradient.astype(hidden.dtype)
    # XLA for CPUs copies a large first operand transposed in float32, and cannot compute the other order in bfloat16.
    if gradient.dtype == jnp.float32:
        d_wte = jnp.einsum("...e,...v->ev", hidden, gradient, preferred_element_type=wte.dtype).T
    else:
        d_wte = jnp.einsum("...v,...e->ve", gradient, hidden, preferred_element_type=wte.dtype)
    return jnp.einsum("...v,ve->...e", gradient, wte.astype(hidden.dtype)), d_wte


head_logits.defvjp(_head_logits_forward, _head_logits_backward)


@jax.custom_vjp
def _head_loss(
    hidden: Float[Array, "*batch embd"],
    wte: Float[Array, "vocab embd"],
    labels: Int[Array, "*batch"],
    weights: Float[Array, "*batch"],
) -> Float[Array, ""]:
    """The sum of `weights` times -log p(label), in nats.

    Its gradient is made in one pass over the logits and written in the type of `hidden`, as the products take it. The
    derivative that JAX makes writes three arrays of the logits' size, two of them in float32.
    """
    return _head_loss_forward(hidden, wte, labels, weights)[0]


def _head_loss_forward(
    hidden: Array, wte: Array, labels: Array, weights: Array
) -> tuple[Float[Array, ""], tuple[Array, ...]]:
    logits = head_logits(hidden, wte)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    losses = log_sum - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.sum(losses * weights), (hidden, wte, labels, weights, logits, log_sum)


def _head_loss_backward(residuals: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    hidden, wte, labels, weights, logits, log_sum = residuals
    chosen = jnp.arange(logits.shape[-1]) == labels[..., None]
    of_logits = (jnp.exp(logits - log_sum[..., None]) - chosen) * (gradient * weights)[..., None]
    return *_head_logits_backward((hidden, wte), of_logits), None, None


_head_loss.defvjp(_head_loss_forward, _head_loss_backward)


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
    weights = _target_mask(mask).astype(jnp.float32)
    batch, seq = tokens.shape
    if chunk in (0, seq):
        return _head_loss(hidden, wte, labels, weights)
    # Along the sequence, never the batch: the batch is sharded over devices.
    chunks = [
        jnp.moveaxis(x.reshape(batch, seq // chunk, chunk, *x.shape[2:]), 1, 0) for x in (hidden, labels, weights)
    ]

    def add(total: Array, inputs: list[Array]) -> tuple[Array, None]:
        hidden, labels, weights = inputs
        return total + jax.checkpoint(_head_loss)(hidden, wte, labels, weights), None

    return jax.lax.scan(add, jnp.float32(0), chunks)[0]


def target_count(mask: Bool[Array, "batch seq"]) -> Float[Array, ""]:
    """Number of tokens that `next_token_loss` sums over."""
    return jnp.sum(_target_mask(mask), dtype=jnp.float32)


def _target_mask(mask: Bool[Array, "batch seq"]) -> Bool[Array, "batch seq"]:
    """Whether each position's next token is predicted."""
    return jnp.roll(mask, -1, axis=1).at[:, -1].set(False)
