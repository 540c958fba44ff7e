"""What all kernels have in common in what they take."""

from typing import Any

import jax.numpy as jnp

HEAD_DIMS = (64, 128)


def array_limit(qkv: Any, dtypes: tuple[str, ...]) -> str:
    """Why a kernel for these types does not take `qkv`, an array or its shape and type; empty if it does."""
    head_dim, dtype = qkv.shape[-1], jnp.dtype(qkv.dtype).name
    if dtype not in dtypes:
        return f"takes {(' and ' if len(dtypes) == 2 else ', ').join(dtypes)}, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"takes head sizes {HEAD_DIMS[0]} and {HEAD_DIMS[1]}, not {head_dim}"
    return ""
