"""Causal flash attention for NVIDIA GPUs from Ampere on, and for the interpreter, in Pallas-Triton.

After FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691): one program computes a tile of queries over
blocks of keys, and in the backward pass one more kernel computes a tile of keys over blocks of queries, so no two
programs add to the same gradient. Pallas-Triton is deprecated since jax 0.11; nothing outside this file knows of it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from biomedlm_jax.devices import Device
from biomedlm_jax.kernels.documents import Documents
from biomedlm_jax.kernels.limits import array_limit

# Below every score. Not the infinity: its difference from itself is a nan.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of queries and of keys that a program works on at a time, warps of a program, stages of its pipeline.

    For the forward kernel, the gradient of q (dq), and the gradients of k and v (dkv). Rows are powers of 2, at
    least 16.
    """

    forward_q: int
    forward_k: int
    forward_warps: int
    forward_stages: int
    dq_q: int
    dq_k: int
    dq_warps: int
    dq_stages: int
    dkv_q: int
    dkv_k: int
    dkv_warps: int
    dkv_stages: int


# By head size and bytes of an element. Registers bound them: a tile's sums and scores in float32 stay there.
_DEFAULT_BLOCKS = {
    (64, 2): Blocks(64, 64, 4, 3, 64, 64, 4, 3, 32, 64, 4, 3),
    (128, 2): Blocks(128, 64, 8, 3, 128, 32, 8, 3, 64, 64, 8, 2),
    (64, 4): Blocks(64, 16, 4, 2, 32, 32, 4, 2, 16, 32, 4, 2),
    (128, 4): Blocks(32, 16, 8, 2, 32, 16, 4, 2, 16, 32, 8, 2),
}


def default_blocks(shape: tuple[int, ...], dtype: Any) -> Blocks:
    """Blocks for the shape and type of a packed projection that compile for all devices without register spills."""
    return _DEFAULT_BLOCKS[shape[-1], jnp.dtype(dtype).itemsize]


def device_limit(device: Device) -> str:
    """Why the kernel does not run on the device; empty if it does."""
    if device.platform != "gpu" or device.capability < 8.0:
        return f"runs on NVIDIA GPUs of compute capability 8.0 or more, and this is {device.kind}"
    return ""


def limit(qkv: Any) -> str:
    """Why the kernel does not take a packed projection of this shape and type; empty if it does."""
    return array_limit(qkv, ("bfloat16", "float16", "float32"))


def forward(
    qkv: Float[Array, "batch seq 3*heads head_dim"],
    scale: Float[Array, ""],
    documents: Documents | None,
    blocks: Blocks,
    interpret: Any,
) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch heads seq"]]:
    """The output, and the base-2 log-sum-exp of the scaled scores of each row."""
    batch, seq, heads, head_dim = _shape(qkv)
    q, k, v = (_heads(seq, head_dim, first) for first in (0, heads, 2 * heads))
    return pl.pallas_call(
        functools.partial(_forward_kernel, blocks=blocks, interpret=bool(interpret)),
        grid=(pl.cdiv(seq, blocks.forward_q), heads, batch),
        in_specs=[_SCALAR, q, k, v, _bounds(documents, seq)],
        out_specs=[_heads(seq, head_dim), _statistic(seq)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, seq, heads, head_dim), qkv.dtype),
            jax.ShapeDtypeStruct((batch, heads, seq), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=blocks.forward_warps, num_stages=blocks.forward_stages),
        interpret=bool(interpret),
        name="flash_attention_forward",
    )(scale, qkv, qkv, qkv, documents and documents.starts)


def backward(
    qkv: Float[Array, "batch seq 3*heads head_dim"],
    scale: Float[Array, ""],
    documents: Documents | None,
    out: Float[Array, "batch seq heads head_dim"],
    lse: Float[Array, "batch heads seq"],
    d_out: Float[Array, "batch seq heads head_dim"],
    blocks: Blocks,
    interpret: Any,
) -> Float[Array, "batch seq 3*heads head_dim"]:
    """The gradient of `qkv`: one kernel writes its first third and the second one, into the same array, the others."""
    batch, seq, heads, head_dim = _shape(qkv)
    q, k, v = (_heads(seq, head_dim, first) for first in (0, heads, 2 * heads))
    whole = pl.BlockSpec((None, seq, 3 * heads, head_dim), lambda tile, head, row: (row, 0, 0, 0))
    row, statistic, bounds = _heads(seq, head_dim), _statistic(seq), _bounds(documents, seq)
    d_qkv, delta = pl.pallas_call(
        functools.partial(_dq_kernel, blocks=blocks, interpret=bool(interpret)),
        grid=(pl.cdiv(seq, blocks.dq_q), heads, batch),
        in_specs=[_SCALAR, q, k, v, bounds, row, statistic, row],
        out_specs=[q, statistic],
        out_shape=[jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=blocks.dq_warps, num_stages=blocks.dq_stages),
        interpret=bool(interpret),
        name="flash_attention_dq",
    )(scale, qkv, qkv, qkv, documents and documents.starts, out, lse, d_out)
    return pl.pallas_call(
        functools.partial(_dkv_kernel, blocks=blocks, interpret=bool(interpret)),
        grid=(pl.cdiv(seq, blocks.dkv_k), heads, batch),
        in_specs=[whole, _SCALAR, q, k, v, bounds, row, statistic, statistic],
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=blocks.dkv_warps, num_stages=blocks.dkv_stages),
        interpret=bool(interpret),
        name="flash_attention_dkv",
    )(d_qkv, scale, qkv, qkv, qkv, documents and documents.ends, d_out, lse, delta)


# Blocks of the arrays that a program sees: whole rows, since the kernels index positions themselves. Programs of the
# same head and row are launched together, so that they share what they read in the cache.
_SCALAR = pl.BlockSpec((), lambda tile, head, row: ())


def _shape(qkv: Any) -> tuple[int, int, int, int]:
    batch, seq, packed, head_dim = qkv.shape
    return batch, seq, packed // 3, head_dim


def _heads(seq: int, head_dim: int, first: int = 0) -> pl.BlockSpec:
    return pl.BlockSpec((None, seq, None, head_dim), lambda tile, head, row: (row, 0, first + head, 0))


def _statistic(seq: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, seq), lambda tile, head, row: (row, head, 0))


def _bounds(documents: Documents | None, seq: int) -> pl.BlockSpec | None:
    return documents and pl.BlockSpec((None, seq), lambda tile, head, row: (row, 0))


def _forward_kernel(
    scale_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    starts_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    blocks: Blocks,
    interpret: bool,
) -> None:
    seq, head_dim = q_ref.shape
    size, block = blocks.forward_q, blocks.forward_k
    # The longest tile first: the short ones fill the gaps at the end.
    start = (pl.cdiv(seq, size) - 1 - pl.program_id(0)) * size
    factor = scale_ref[...] * math.log2(math.e)
    q = _load(q_ref, start, size)
    # The largest product has the largest score only under a positive factor.
    q = jnp.where(factor < 0, -q, q)
    factor = jnp.abs(factor)
    starts = None if starts_ref is None else _load(starts_ref, start, size)

    def body(index: Any, carry: Any, masked: bool) -> Any:
        out, top, total = carry
        k = _load(k_ref, index * block, block, masked)
        scores = _dot(q, k.T)
        if masked:
            allowed = _allowed(start, size, index * block, block, starts)
            scores = jnp.where(allowed, scores, _LOWEST)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        p = _exp2(scores, factor, (new_top * factor)[:, None], interpret)
        if masked:
            p = jnp.where(allowed, p, 0)
        correction = jnp.exp2((top - new_top) * factor)
        v = _load(v_ref, index * block, block, masked)
        out = out * correction[:, None] + _dot(p.astype(v.dtype), v)
        return out, new_top, total * correction + jnp.sum(p, axis=1)

    zeros = jnp.zeros(size, jnp.float32)
    carry = jnp.zeros((size, head_dim), jnp.float32), zeros + _LOWEST, zeros
    out, top, total = _over_keys(body, carry, seq, start, size, block, starts_ref)
    _store(out_ref, start, out / total[:, None])
    _store(lse_ref, start, top * factor + jnp.log2(total))


def _dq_kernel(
    scale_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    starts_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    d_out_ref: Any,
    dq_ref: Any,
    delta_ref: Any,
    *,
    blocks: Blocks,
    interpret: bool,
) -> None:
    seq, head_dim = q_ref.shape
    size, block = blocks.dq_q, blocks.dq_k
    start = (pl.cdiv(seq, size) - 1 - pl.program_id(0)) * size
    scale = scale_ref[...]
    factor = scale * math.log2(math.e)
    q, d_out, lse = (_load(ref, start, size) for ref in (q_ref, d_out_ref, lse_ref))
    starts = None if starts_ref is None else _load(starts_ref, start, size)
    delta = jnp.sum(_load(out_ref, start, size).astype(jnp.float32) * d_out.astype(jnp.float32), axis=1)
    _store(delta_ref, start, delta)

    def body(index: Any, dq: Any, masked: bool) -> Any:
        k = _load(k_ref, index * block, block, masked)
        v = _load(v_ref, index * block, block, masked)
        p = _exp2(_dot(q, k.T), factor, lse[:, None], interpret)
        if masked:
            p = jnp.where(_allowed(start, size, index * block, block, starts), p, 0)
        ds = p * (_dot(d_out, v.T) - delta[:, None])
        return dq + _dot(ds.astype(k.dtype), k)

    dq = _over_keys(body, jnp.zeros((size, head_dim), jnp.float32), seq, start, size, block, starts_ref)
    _store(dq_ref, start, dq * scale)


def _dkv_kernel(
    _: Any,
    scale_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    ends_ref: Any,
    d_out_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    d_qkv_ref: Any,
    *,
    blocks: Blocks,
    interpret: bool,
) -> None:
    seq, head_dim = q_ref.shape
    size, block = blocks.dkv_k, blocks.dkv_q
    start = pl.program_id(0) * size
    scale = scale_ref[...]
    factor = scale * math.log2(math.e)
    k, v = _load(k_ref, start, size), _load(v_ref, start, size)
    ends = None if ends_ref is None else _load(ends_ref, start, size)

    def body(index: Any, carry: Any, masked: bool) -> Any:
        # All transposed, keys by queries. Past the last query all is 0, and adds nothing.
        dk, dv = carry
        q, d_out, lse, delta = (_load(ref, index * block, block) for ref in (q_ref, d_out_ref, lse_ref, delta_ref))
        p = _exp2(_dot(k, q.T), factor, lse[None, :], interpret)
        if masked:
            rows, columns = start + jnp.arange(size)[:, None], index * block + jnp.arange(block)[None, :]
            allowed = rows <= columns
            if ends is not None:
                allowed &= columns < ends[:, None]
            p = jnp.where(allowed, p, 0)
        dv += _dot(p.astype(d_out.dtype), d_out)
        ds = p * (_dot(v, d_out.T) - delta[None, :])
        return dk + _dot(ds.astype(q.dtype), q), dv

    # Blocks of queries: some on the diagonal, whole ones, and with documents some where those of the keys end.
    low, high = start // block, pl.cdiv(seq, block)
    diagonal = (start + size + block - 1) // block
    last = high
    if ends_ref is not None:
        high = (ends_ref[jnp.minimum(start + size, seq) - 1] + block - 1) // block
        last = ends_ref[start] // block
    diagonal = jnp.minimum(diagonal, high)
    last = jnp.maximum(last, diagonal)
    zeros = jnp.zeros((size, head_dim), jnp.float32)
    carry = lax.fori_loop(low, diagonal, functools.partial(body, masked=True), (zeros, zeros))
    carry = lax.fori_loop(diagonal, last, functools.partial(body, masked=False), carry)
    if ends_ref is not None:
        carry = lax.fori_loop(last, high, functools.partial(body, masked=True), carry)
    dk, dv = carry
    heads, head = d_qkv_ref.shape[1] // 3, pl.program_id(1)
    _store(d_qkv_ref, start, dk * scale, heads + head)
    _store(d_qkv_ref, start, dv, 2 * heads + head)


def _over_keys(
    body: Callable[..., Any], carry: Any, seq: int, start: Any, size: int, block: int, starts_ref: Any
) -> Any:
    """Runs `body(index, carry, masked)` over the blocks of keys that the tile of queries from `start` on attends to.

    With documents some at the beginning are masked, then whole ones follow, then those on the diagonal.
    """
    diagonal, high = start // block, (jnp.minimum(start + size, seq) + block - 1) // block
    low: Any = 0
    if starts_ref is not None:
        last = starts_ref[jnp.minimum(start + size, seq) - 1]
        first, low = starts_ref[start] // block, jnp.minimum((last + block - 1) // block, diagonal)
        carry = lax.fori_loop(first, low, functools.partial(body, masked=True), carry)
    carry = lax.fori_loop(low, diagonal, functools.partial(body, masked=False), carry)
    return lax.fori_loop(diagonal, high, functools.partial(body, masked=True), carry)


def _allowed(start: Any, size: int, start_k: Any, block: int, starts: Any) -> Any:
    rows, columns = start + jnp.arange(size)[:, None], start_k + jnp.arange(block)[None, :]
    allowed = columns <= rows
    return allowed if starts is None else allowed & (columns >= starts[:, None])


def _dot(a: Any, b: Any) -> Any:
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _exp2(x: Any, factor: Any, shift: Any, interpret: bool) -> Any:
    """exp2(x * factor - shift), in two instructions; jnp's take six, for the sake of subnormal results."""
    if interpret:
        return jnp.exp2(x * factor - shift)
    (result,) = plgpu.elementwise_inline_asm(
        "{ .reg .f32 t; fma.rn.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }",
        args=[x, jnp.broadcast_to(factor, x.shape), jnp.broadcast_to(-shift, x.shape)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result


def _load(ref: Any, start: Any, size: int, partial: bool = True) -> Any:
    """Positions `start` to `start + size`; those past the end are 0 and, if none can be (not `partial`), unmasked."""
    mask = _inside(ref, start, size, ref.shape[1:]) if partial else None
    return plgpu.load(ref.at[pl.ds(start, size)], mask=mask, other=None if mask is None else 0)


def _store(ref: Any, start: Any, value: Any, head: Any = None) -> None:
    at = ref.at[pl.ds(start, value.shape[0])] if head is None else ref.at[pl.ds(start, value.shape[0]), head]
    plgpu.store(at, value.astype(ref.dtype), mask=_inside(ref, start, value.shape[0], value.shape[1:]))


def _inside(ref: Any, start: Any, size: int, rest: tuple[int, ...]) -> Any:
    if ref.shape[0] % size == 0:
        return None
    inside = start + jnp.arange(size) < ref.shape[0]
    return inside[:, None] if rest else inside
