"""The plain computation that the kernels are compared with, and what runs where no kernel serves: O(seq^2) memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from biomedlm_jax.kernels.documents import Documents


def allowed_pairs(seq: int, documents: Documents | None) -> Bool[Array, "#batch seq seq"]:
    """Whether a query (second axis) may attend to a key (third axis): causal, and inside one document."""
    allowed = jnp.tril(jnp.ones((1, seq, seq), bool))
    if documents is None:
        return allowed
    return allowed & (jnp.arange(seq) >= documents.starts[:, :, None])


def attention(
    qkv: Float[Array, "batch seq 3*heads head_dim"], scale: Float[Array, ""] | float, documents: Documents | None = None
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal softmax attention, computed in float32 whatever the inputs' type, and returned in that type."""
    q, k, v = (x.astype(jnp.float32) for x in jnp.split(qkv, 3, axis=2))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * scale
    allowed = allowed_pairs(qkv.shape[1], documents)[:, None]
    probabilities = jax.nn.softmax(scores, axis=-1, where=allowed)
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities, v, precision="highest").astype(qkv.dtype)
