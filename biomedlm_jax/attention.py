"""Causal self-attention from one packed projection: which implementation runs, and the plain one."""

import functools
import itertools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from biomedlm_jax import sharding
from biomedlm_jax.devices import current_device
from biomedlm_jax.errors import UserError
from biomedlm_jax.kernels.documents import documents
from biomedlm_jax.kernels.flash_attention import choose_backend, flash_attention
from biomedlm_jax.kernels.reference import allowed_pairs

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "flash", "cudnn", "reference"]

# cuDNN's flash attention: Ampere and later, half precision, head sizes that are multiples of 8 up to 128.
_CUDNN_CAPABILITY = 8.0
_CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)


def causal_attention(
    qkv: Float[Array, "batch seq 3*heads head_dim"],
    scale: Float[Array, ""] | float,
    *,
    implementation: Implementation = "auto",
    segment_ids: Int[Array, "batch seq"] | None = None,
    mask: Bool[Array, "batch seq"] | None = None,
    dropout_rate: float = 0.0,
    dropout_keys: Key[Array, "batch"] | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention of each position over itself and those before it.

    Args:
      qkv: queries, keys and values of all heads, in this order along the third axis.
      scale: factor of the scores; may be traced (it differs by layer under a scan).
      implementation: 'auto' takes the first of flash, cudnn and reference that serves the device and the arguments.
      segment_ids: documents packed in a row, as runs of equal ids, which do not attend to each other.
      mask: true for positions that may be attended to; a position that may attend to nothing gets the mean
        of all values, as in Hugging Face's GPT-2.
      dropout_rate: rate at which probabilities are dropped; needs `dropout_keys`.
      dropout_keys: a key for each row; without them nothing is dropped.

    Raises:
      UserError: the implementation asked for cannot take the arguments; names the limit.
    """
    if dropout_rate == 0:
        dropout_keys = None
    extras = [
        what
        for what, given in (
            ("an attention mask", mask is not None),
            ("dropout of attention probabilities (model.attn_pdrop)", dropout_keys is not None),
        )
        if given
    ]
    if implementation == "auto":
        implementation = _choose(qkv, extras, segment_ids is not None)
    if implementation == "flash":
        return _flash(qkv, scale, segment_ids, extras)
    if implementation == "cudnn":
        return _cudnn(qkv, scale, extras, segment_ids is not None)
    return _reference(qkv, scale, segment_ids, mask, dropout_rate, dropout_keys)


def _choose(qkv: Array, extras: list[str], packed: bool) -> Implementation:
    """The first implementation without a limit; its name is logged, with the limits of those passed over."""
    limits: dict[Implementation, str] = {
        "flash": _flash_limit(qkv, extras),
        "cudnn": _cudnn_limit(qkv, extras, packed),
        "reference": "",
    }
    passed_over = "; ".join(itertools.takewhile(bool, limits.values()))
    name = next(name for name, limit in limits.items() if not limit)
    _log_once(logging.INFO, f"attention: {name}" + (f" ({passed_over})" if passed_over else ""))
    return name


@functools.cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)


def _flash_limit(qkv: Array, extras: list[str]) -> str:
    """Why no flash attention kernel of ours takes these arguments; empty if one does."""
    if extras:
        return f"flash attention is not used with {extras[0]}"
    try:
        choose_backend(qkv, current_device())
    except UserError as error:
        return str(error)
    return ""


def _flash(qkv: Array, scale: Any, segment_ids: Any, extras: list[str]) -> Array:
    if extras:
        raise UserError(f"attention: {_flash_limit(qkv, extras)}; use attention: auto or reference")
    rows = sharding.rows_spec(qkv.shape[0])
    if current_device().platform != "cpu":
        return flash_attention(qkv, scale, segment_ids, rows=rows)
    out = flash_attention(qkv, scale, segment_ids, rows=rows, backend="triton", interpret=True)
    _log_once(logging.WARNING, "attention: flash runs interpreted on a CPU, to be tested: reference is far faster here")
    return out


def _cudnn_limit(qkv: Array, extras: list[str], packed: bool) -> str:
    """Why cuDNN cannot take these arguments; empty if it can."""
    device = current_device()
    if device.platform != "gpu":
        return f"cudnn runs on NVIDIA GPUs, and this is a {device.platform}"
    if device.capability < _CUDNN_CAPABILITY:
        return f"cudnn runs on NVIDIA Ampere and later, and this is a {device.kind}"
    if qkv.dtype not in _CUDNN_DTYPES:
        return f"cudnn takes bfloat16 and float16, not {qkv.dtype}"
    if qkv.shape[-1] % 8 or qkv.shape[-1] > 128:
        return f"cudnn takes head sizes that are multiples of 8 up to 128, not {qkv.shape[-1]}"
    if packed:
        return "cudnn is not used with packed documents (segment_ids)"
    return f"cudnn is not used with {extras[0]}" if extras else ""


def _cudnn(qkv: Array, scale: Any, extras: list[str], packed: bool) -> Array:
    limit = _cudnn_limit(qkv, extras, packed)
    if limit:
        raise UserError(f"attention: {limit}; use attention: auto or reference")
    q, k, v = jnp.split(qkv, 3, axis=2)
    # cuDNN's own scale is a constant of the program, and ours is traced.
    q = (q * scale).astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True, implementation="cudnn")


def _reference(
    qkv: Array, scale: Any, segment_ids: Array | None, mask: Array | None, rate: float, dropout_keys: Array | None
) -> Array:
    """Scores and softmax in float32, products in the inputs' type, unlike `kernels.reference`: O(seq^2) memory."""
    q, k, v = jnp.split(qkv, 3, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    allowed = allowed_pairs(qkv.shape[1], None if segment_ids is None else documents(segment_ids))[:, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
    # The lowest finite number, not -inf: a row with nothing allowed stays finite.
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", dropout(probabilities, rate, dropout_keys), v)


def dropout(
    x: Float[Array, "batch *rest"], rate: float, keys: Key[Array, "batch"] | None
) -> Float[Array, "batch *rest"]:
    """Zeros at `rate`, the rest scaled to keep the mean; without keys nothing is dropped.

    Each row draws with a key of its own, so that its mask depends on no other row, nor on where the row lies.
    """
    if rate == 0 or keys is None:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0)
