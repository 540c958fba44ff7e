"""Where the document of each position begins and ends: what the kernels know of `segment_ids`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Documents(NamedTuple):
    """For each position, the bounds of its document. Both never decrease along a row.

    So a block of queries needs no key before the start of its first query's document, and a block of keys no query
    at or past the end of its last key's: blocks between different documents are skipped, not masked.
    """

    starts: Int[Array, "batch seq"]
    """First position of the document, int32."""
    ends: Int[Array, "batch seq"]
    """One past the last position of the document, int32."""


def documents(segment_ids: Int[Array, "batch seq"]) -> Documents:
    """The bounds of each run of equal ids.

    Rows are packed documents, one after the other, so an id that comes back after another one begins a new document.
    """
    seq = segment_ids.shape[1]
    positions = jnp.arange(seq, dtype=jnp.int32)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones_like(segment_ids[:, :1], dtype=bool)
    starts = jax.lax.cummax(jnp.where(jnp.concatenate([edge, changes], axis=1), positions, 0), axis=1)
    last = jnp.where(jnp.concatenate([changes, edge], axis=1), positions + 1, seq)
    return Documents(starts, jax.lax.cummin(last, axis=1, reverse=True))
