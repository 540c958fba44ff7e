"""Causal self-attention from one packed projection: which implementation runs, and the reference."""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from biomedlm_jax.errors import UserError

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "cudnn", "reference"]

# cuDNN's flash attention: Ampere and later, half precision, head sizes that are multiples of 8 up to 128.
_CUDNN_CAPABILITY = 8.0
_CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)


def causal_attention(
    qkv: Float[Array, "batch seq 3*heads head_dim"],
    scale: Float[Array, ""] | float,
    *,
    implementation: Implementation = "auto",
    mask: Bool[Array, "batch seq"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention of each position over itself and those before it.

    Args:
      qkv: queries, keys and values of all heads, in this order along the third axis.
      scale: factor of the scores; may be traced (it differs by layer under a scan).
      implementation: 'auto' takes the fastest that serves the device and the arguments.
      mask: true for positions that may be attended to; a position that may attend to nothing gets the mean
        of all values, as in Hugging Face's GPT-2.
      dropout_rate: rate at which probabilities are dropped; needs `dropout_key`.
      dropout_key: without it nothing is dropped.

    Raises:
      UserError: 'cudnn' was asked for and cannot take the arguments; names the limit.
    """
    heads = qkv.shape[2] // 3
    if dropout_rate == 0:
        dropout_key = None
    limit = _cudnn_limit(qkv, masked=mask is not None, dropping=dropout_key is not None)
    if implementation == "auto":
        implementation = "reference" if limit else "cudnn"
        _log_choice(implementation, limit)
    q, k, v = qkv[:, :, :heads], qkv[:, :, heads : 2 * heads], qkv[:, :, 2 * heads :]
    if implementation == "cudnn":
        if limit:
            raise UserError(f"attention: cudnn {limit}; use attention: auto or reference")
        # cuDNN's own scale is a constant of the program, and ours is traced.
        q = (q * scale).astype(q.dtype)
        return jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True, implementation="cudnn")
    return _reference(q, k, v, scale, mask, dropout_rate, dropout_key)


def _cudnn_limit(qkv: Float[Array, "batch seq 3*heads head_dim"], *, masked: bool, dropping: bool) -> str:
    """Why cuDNN cannot take these arguments; empty if it can."""
    if jax.default_backend() != "gpu":
        return f"runs on NVIDIA GPUs, and this is a {jax.default_backend()}"
    device = jax.devices()[0]
    if float(getattr(device, "compute_capability", 0)) < _CUDNN_CAPABILITY:
        return f"runs on NVIDIA Ampere and later, and this is a {device.device_kind}"
    if qkv.dtype not in _CUDNN_DTYPES:
        return f"takes bfloat16 and float16, not {qkv.dtype}"
    if qkv.shape[-1] % 8 or qkv.shape[-1] > 128:
        return f"takes head sizes that are multiples of 8 up to 128, not {qkv.shape[-1]}"
    if masked:
        return "is not used with an attention mask"
    if dropping:
        return "is not used with dropout of attention probabilities (model.attn_pdrop)"
    return ""


@functools.cache
def _log_choice(implementation: str, limit: str) -> None:
    logger.info("attention: %s%s", implementation, f" (cudnn {limit})" if limit else "")


def _reference(
    q: Array, k: Array, v: Array, scale: Array | float, mask: Array | None, rate: float, dropout_key: Array | None
) -> Array:
    """Scores and softmax in float32, products in the inputs' type: O(seq^2) memory."""
    seq = q.shape[1]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    allowed = jnp.tril(jnp.ones((seq, seq), bool))
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
    # The lowest finite number, not -inf: a row with nothing allowed stays finite.
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", dropout(probabilities, rate, dropout_key), v)


def dropout(x: Float[Array, "*shape"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*shape"]:
    """Zeros at `rate`, the rest scaled to keep the mean; without a key nothing is dropped."""
    if rate == 0 or key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
