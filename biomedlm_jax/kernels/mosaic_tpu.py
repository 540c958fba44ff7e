"""Flash attention for TPUs, by Pallas's Mosaic compiler.

The packed projection is read as `[batch, seq, 3 * columns * 128]`, in blocks of 128 columns, a vector register's width:
one head of size 128, or two of size 64. The kernel treats two such heads at once, each with the other's columns set to
zero; a matrix unit, which is 128 wide, would not be faster on 64.

Grids are [columns, batch, pairs]. The last axis runs over the pairs of a block of queries and a block of keys on or
below the diagonal, and no others; which these are is read from two tables.

The backward pass visits each pair once. It holds scores as [keys, queries], so that what belongs to a query (its
log-sum-exp, and delta, the sum of `out * d_out` over its head) lies along a register and is kept without waste.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from biomedlm_jax.devices import Device
from biomedlm_jax.kernels.documents import Documents
from biomedlm_jax.kernels.limits import array_limit

_LANES = 128
_LOG2_E = math.log2(math.e)

# Finite, so that a row whose keys are all masked so far gives no nan; what it gives is wiped by the first true score.
_MASKED = -1e30

# What the backward pass may use of the fast memory: more than the default, for a whole row of dq in float32.
_VMEM = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys of a block, in multiples of 128."""

    q: int
    k: int
    backward_q: int
    backward_k: int


def default_blocks(shape: tuple[int, ...], dtype: Any) -> Blocks:
    """Blocks of 512, and no longer than the row."""
    # In float32, two heads of 512 and a row of 16,384 exceed the 16 MB of a TPU v4.
    row = pl.cdiv(shape[1], _LANES) * _LANES
    size, backward = min(512, row), min(256 if dtype == jnp.float32 else 512, row)
    return Blocks(size, size, backward, backward)


def device_limit(device: Device) -> str:
    """Why the kernel does not run on the device; empty if it does."""
    if device.platform != "tpu" or device.kind.startswith(("TPU v2", "TPU v3")):
        return f"runs on TPUs from v4 on, and this is {device.kind}"
    return ""


def limit(qkv: Any) -> str:
    """Why the kernel does not take an array of this shape and type; empty if it does."""
    return array_limit(qkv, ("bfloat16", "float32"))


class _Call(NamedTuple):
    """What is static about a pass, and what follows from it."""

    seq: int
    head_dim: int
    dtype: Any
    q_size: int
    k_size: int

    @property
    def heads(self) -> int:
        """Heads of a block of columns."""
        return _LANES // self.head_dim

    def count(self, size: int) -> int:
        """Blocks of a row."""
        return pl.cdiv(self.seq, size)

    def pairs(self, by_k: bool) -> Int[np.ndarray, "2 pairs"]:
        """All pairs of a block of queries and one of keys on or below the diagonal, by the one or by the other."""
        i, j = np.indices((self.count(self.q_size), self.count(self.k_size)), np.int32)
        if by_k:
            i, j = i.T, j.T
        visited = j * self.k_size < (i + 1) * self.q_size
        return np.stack([i[visited], j[visited]])

    def is_first(self, q_block: Any, k_block: Any) -> Any:
        """Whether no block of queries before this one is paired with the block of keys."""
        return q_block * self.q_size <= k_block * self.k_size

    def is_last(self, q_block: Any, k_block: Any) -> Any:
        """Whether no block of keys after this one is paired with the block of queries."""
        return (k_block + 1) * self.k_size >= jnp.minimum((q_block + 1) * self.q_size, self.seq)

    def below(self, q_block: Any, k_block: Any) -> Any:
        """Whether all keys of a block come before all queries of the other."""
        return (k_block + 1) * self.k_size <= q_block * self.q_size

    def clear(self, x: Array, block: Any, axis: int = 0) -> Array:
        """Zeros in place of what lies past the end of the row: it may be nan, and zero times nan is nan."""
        size = x.shape[axis]
        return jnp.where(block * size + _iota(x.shape, axis) < self.seq, x, 0) if self.seq % size else x

    def own(self, x: Array, head: int, other: int = 0) -> Array:
        """The columns of one head, and `other` in those of the other one."""
        if self.heads == 1:
            return x
        # Selected in float32: of bfloat16, the compiler cannot where a row has one or two positions.
        mine = (_iota(x.shape, 1) < self.head_dim) == (head == 0)
        return jnp.where(mine, x.astype(jnp.float32), other).astype(x.dtype)

    def dot(self, x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
        """Product over the given axes, summed in float32."""
        precision = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
        return jax.lax.dot_general(
            x, y, (((x_axis,), (y_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    def cost(self, products: int, packed: Array, *others: Any) -> pl.CostEstimate:
        """What the scheduler of the program around the kernel should know; each array is moved once."""
        batch, seq, columns = packed.shape
        pairs = batch * columns // 3 * seq**2 // 2
        return pl.CostEstimate(
            flops=2 * products * pairs,
            transcendentals=pairs // self.head_dim,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (packed, *others)),
        )


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _columns(x: Array, parts: int) -> Float[Array, "batch seq columns"]:
    """All parts' heads side by side. An odd number of heads of size 64 gets one more, which costs a copy."""
    batch, seq, heads, head_dim = x.shape
    odd = heads // parts * head_dim % _LANES // head_dim
    if odd:
        x = jnp.pad(x.reshape(batch, seq, parts, -1, head_dim), [(0, 0)] * 3 + [(0, odd), (0, 0)])
    return x.reshape(batch, seq, -1)


def _heads(x: Array, parts: int, shape: tuple[int, ...]) -> Array:
    """The inverse of `_columns`."""
    batch, seq, heads, head_dim = shape
    return x[:, :seq].reshape(batch, seq, parts, -1, head_dim)[:, :, :, : heads // parts].reshape(shape)


_SCALAR = pl.BlockSpec(memory_space=pltpu.SMEM)


def forward(
    qkv: Float[Array, "batch seq 3*heads head_dim"],
    scale: Float[Array, ""],
    documents: Documents | None,
    blocks: Blocks,
    interpret: Any,
) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch columns heads_of_column seq"]]:
    """The output, and the base-2 log-sum-exp of each row of scores."""
    batch, seq, heads, head_dim = qkv.shape
    call = _Call(seq, head_dim, qkv.dtype, blocks.q, blocks.k)
    packed = _columns(qkv, 3)
    columns = packed.shape[2] // (3 * _LANES)
    pairs = call.pairs(by_k=False)
    q_count = call.count(call.q_size)

    tables = None
    if documents is not None:
        # A block of queries needs the keys from its first query's document on, and no mask past its last one's start.
        last = np.minimum(np.arange(1, q_count + 1) * call.q_size, seq) - 1
        tables = (
            documents.starts[:, :: call.q_size].reshape(-1) // call.k_size,
            pl.cdiv(documents.starts[:, last].reshape(-1), call.k_size),
        )

    def k_block(b: Any, t: Any, q_of: Any, k_of: Any, tables: Any) -> Any:
        # What is skipped is not fetched either: the block stays that which is needed next.
        return k_of[t] if tables is None else jnp.maximum(k_of[t], tables[0][b * q_count + q_of[t]])

    def of_queries(c: Any, b: Any, t: Any, q_of: Any, k_of: Any, tables: Any) -> Any:
        return b, q_of[t], c

    def of_keys(part: int, c: Any, b: Any, t: Any, *prefetched: Any) -> Any:
        return b, k_block(b, t, *prefetched), part * columns + c

    def kernel(
        q_of: Any, k_of: Any, tables: Any, scale: Any, q: Any, k: Any, v: Any, ends: Any, out: Any, lse: Any,
        top: Any, total: Any, sums: Any,
    ) -> None:  # fmt: skip
        b, t = pl.program_id(1), pl.program_id(2)
        i, j = q_of[t], k_of[t]

        @pl.when(j == 0)
        def _start() -> None:
            top[...] = jnp.full_like(top, _MASKED)
            total[...] = jnp.zeros_like(total)
            sums[...] = jnp.zeros_like(sums)

        def step(masked: bool) -> None:
            values = call.clear(v[0], j) if masked else v[0]
            if masked:
                shape = (call.q_size, call.k_size)
                queries = i * call.q_size + _iota(shape, 0)
                allowed = j * call.k_size + _iota(shape, 1) <= queries
                if ends is not None:
                    allowed &= queries < ends[0]
            for head in range(call.heads):
                scores = call.dot(call.own(q[0], head), k[0], 1, 1) * (scale[0] * _LOG2_E)
                if masked:
                    scores = jnp.where(allowed, scores, _MASKED)
                new_top = jnp.maximum(top[head], jnp.max(scores, axis=1, keepdims=True))
                p = jnp.exp2(scores - jnp.tile(new_top, (1, call.k_size // _LANES)))
                shrink = jnp.exp2(top[head] - new_top)
                total[head] = total[head] * shrink + jnp.sum(p, axis=1, keepdims=True)
                top[head] = new_top
                sums[...] *= call.own(shrink, head, other=1)
                sums[...] += call.dot(p.astype(call.dtype), call.own(values, head), 1, 0)

        needed, whole = j >= 0, call.below(i, j)
        if tables is not None:
            needed, whole = (j >= table[b * q_count + i] for table in tables)
            whole &= call.below(i, j)
        pl.when(needed & whole)(lambda: step(masked=False))
        pl.when(needed & ~whole)(lambda: step(masked=True))

        @pl.when(call.is_last(i, j))
        def _finish() -> None:
            totals = sum(call.own(total[head], head) for head in range(call.heads))
            out[0] = (sums[...] / totals).astype(out.dtype)
            for head in range(call.heads):
                lse[0, 0, head] = (top[head] + jnp.log2(total[head])).T[0]

    block = (1, call.q_size, _LANES)
    key_block = (1, call.k_size, _LANES)
    out_shape = [
        jax.ShapeDtypeStruct((batch, seq, columns * _LANES), qkv.dtype),
        jax.ShapeDtypeStruct((batch, columns, call.heads, seq), jnp.float32),
    ]
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(columns, batch, pairs.shape[1]),
            in_specs=[
                _SCALAR,
                pl.BlockSpec(block, of_queries),
                pl.BlockSpec(key_block, functools.partial(of_keys, 1)),
                pl.BlockSpec(key_block, functools.partial(of_keys, 2)),
                documents
                and pl.BlockSpec((1, 1, call.k_size), lambda c, b, t, *tables: (b, 0, k_block(b, t, *tables))),
            ],
            out_specs=[
                pl.BlockSpec(block, of_queries),
                pl.BlockSpec((1, 1, call.heads, call.q_size), lambda c, b, t, q_of, *_: (b, c, 0, q_of[t])),
            ],
            scratch_shapes=[
                pltpu.VMEM((call.heads, call.q_size, _LANES), jnp.float32),
                pltpu.VMEM((call.heads, call.q_size, _LANES), jnp.float32),
                pltpu.VMEM((call.q_size, _LANES), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=call.cost(2, packed, *out_shape),
        interpret=interpret,
        name="flash_attention_forward",
    )(*pairs, tables, scale.reshape(1), packed, packed, packed, documents and documents.ends[:, None])
    return _heads(out, 1, (batch, seq, heads // 3, head_dim)), lse


def backward(
    qkv: Float[Array, "batch seq 3*heads head_dim"],
    scale: Float[Array, ""],
    documents: Documents | None,
    out: Float[Array, "batch seq heads head_dim"],
    lse: Float[Array, "batch columns heads_of_column seq"],
    d_out: Float[Array, "batch seq heads head_dim"],
    blocks: Blocks,
    interpret: Any,
) -> Float[Array, "batch seq 3*heads head_dim"]:
    """The gradients of queries, keys and values, packed as these are."""
    batch, seq, _, head_dim = qkv.shape
    call = _Call(seq, head_dim, qkv.dtype, blocks.backward_q, blocks.backward_k)
    packed = _columns(qkv, 3)
    columns = packed.shape[2] // (3 * _LANES)
    pairs = call.pairs(by_k=True)
    q_count, k_count = call.count(call.q_size), call.count(call.k_size)
    counts = (q_count, k_count, k_count)
    # Whole tiles of 8 positions: a copy of half a register's word is not possible.
    rows = pl.cdiv(seq, 8) * 8

    tables = None
    if documents is not None:
        # A block of keys is needed up to its last key's document, and no mask before the end of its first one's.
        last = np.minimum(np.arange(1, k_count + 1) * call.k_size, seq) - 1
        tables = (
            (documents.ends[:, last].reshape(-1) - 1) // call.q_size,
            documents.ends[:, :: call.k_size].reshape(-1) // call.q_size - 1,
        )

    def q_block(b: Any, t: Any, q_of: Any, k_of: Any, tables: Any) -> Any:
        # What is skipped is not fetched either. The first block of keys goes with all queries, to find delta.
        if tables is None:
            return q_of[t]
        return jnp.where(k_of[t] == 0, q_of[t], jnp.minimum(q_of[t], tables[0][b * k_count + k_of[t]]))

    def of_queries(c: Any, b: Any, t: Any, *prefetched: Any) -> Any:
        return b, q_block(b, t, *prefetched), c

    def of_output(c: Any, b: Any, t: Any, q_of: Any, k_of: Any, tables: Any) -> Any:
        return b, jnp.where(k_of[t] == 0, q_of[t], q_count - 1), c

    def of_keys(part: int, c: Any, b: Any, t: Any, q_of: Any, k_of: Any, tables: Any) -> Any:
        return b, k_of[t], part * columns + c

    def kernel(
        q_of: Any, k_of: Any, tables: Any, scale: Any, q: Any, k: Any, v: Any, d_out: Any, out: Any, lse: Any,
        starts: Any, d_qkv: Any, d_q: Any, d_k: Any, d_v: Any, delta: Any, ready: Any, copied: Any,
    ) -> None:  # fmt: skip
        c, b, t = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        i, j = q_of[t], k_of[t]

        def copies(part: int, block: Any, action: Any) -> None:
            """Starts or awaits the copy of a block into the packed gradient; the last block may be shorter."""
            count, size = counts[part], ready[part].shape[0]

            def copy(length: int) -> None:
                row, column = (pl.multiple_of(x * y, y) for x, y in ((block, size), (part * columns + c, _LANES)))
                target = d_qkv.at[b, pl.ds(row, length), pl.ds(column, _LANES)]
                action(pltpu.make_async_copy(ready[part].at[pl.ds(0, length)], target, copied.at[part]))

            rest = rows - (count - 1) * size
            if count == 1 or rest == size:
                copy(rest)
            else:
                pl.when(block < count - 1)(lambda: copy(size))
                pl.when(block == count - 1)(lambda: copy(rest))

        def write(part: int, block: Any, value: Array) -> None:
            """Starts the copy of a block, once that of the one before, maybe of the row before, has ended."""

            @pl.when((block > 0) | (b > 0))
            def _wait() -> None:
                copies(part, jnp.where(block > 0, block, counts[part]) - 1, lambda copy: copy.wait())

            ready[part][...] = value.astype(call.dtype)
            copies(part, block, lambda copy: copy.start())

        @pl.when(j == 0)
        def _start_q() -> None:
            d_q[i] = jnp.zeros_like(d_q[i])
            both = call.clear(out[0].astype(jnp.float32) * d_out[0].astype(jnp.float32), i).T
            for head in range(call.heads):
                own = both[head * head_dim : (head + 1) * head_dim]
                delta[i, head] = jnp.sum(own, axis=0)

        @pl.when(call.is_first(i, j))
        def _start_k() -> None:
            d_k[...] = jnp.zeros_like(d_k)
            d_v[...] = jnp.zeros_like(d_v)

        def step(masked: bool) -> None:
            queries, d_outs, keys, values = (
                call.clear(x[0], block) for x, block in ((q, i), (d_out, i), (k, j), (v, j))
            )
            if masked:
                shape = (call.k_size, call.q_size)
                key = j * call.k_size + _iota(shape, 0)
                allowed = key <= i * call.q_size + _iota(shape, 1)
                if starts is not None:
                    allowed &= key >= starts[0]
            sums = call.clear(lse[0, 0], i, axis=1)
            for head in range(call.heads):
                q_own, d_out_own, k_own = (call.own(x, head) for x in (queries, d_outs, keys))
                scores = call.dot(keys, q_own, 1, 1) * (scale[0] * _LOG2_E)
                p = jnp.exp2(scores - sums[head : head + 1])
                if masked:
                    p = jnp.where(allowed, p, 0)
                d_v[...] += call.dot(p.astype(call.dtype), d_out_own, 1, 0)
                d_scores = p * (call.dot(values, d_out_own, 1, 1) - delta[i, head : head + 1])
                d_scores = d_scores.astype(call.dtype)
                d_k[...] += call.dot(d_scores, q_own, 1, 0)
                d_q[i] += call.dot(d_scores, k_own, 0, 0)

        needed, whole = j >= 0, call.below(i, j)
        if tables is not None:
            needed, whole = (i <= table[b * k_count + j] for table in tables)
            whole &= call.below(i, j)
        pl.when(needed & whole)(lambda: step(masked=False))
        pl.when(needed & ~whole)(lambda: step(masked=True))

        @pl.when(i == q_count - 1)
        def _finish_k() -> None:
            write(1, j, d_k[...] * scale[0])
            write(2, j, d_v[...])

        @pl.when(call.is_last(i, j))
        def _finish_q() -> None:
            write(0, i, d_q[i] * scale[0])

        @pl.when((b == batch - 1) & (t == pairs.shape[1] - 1))
        def _wait() -> None:
            for part, count in enumerate(counts):
                copies(part, count - 1, lambda copy: copy.wait())

    block = (1, call.q_size, _LANES)
    key_block = (1, call.k_size, _LANES)
    out_shape = jax.ShapeDtypeStruct((batch, rows, packed.shape[2]), qkv.dtype)
    d_qkv = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(columns, batch, pairs.shape[1]),
            in_specs=[
                _SCALAR,
                pl.BlockSpec(block, of_queries),
                pl.BlockSpec(key_block, functools.partial(of_keys, 1)),
                pl.BlockSpec(key_block, functools.partial(of_keys, 2)),
                pl.BlockSpec(block, of_queries),
                pl.BlockSpec(block, of_output),
                pl.BlockSpec(
                    (1, 1, call.heads, call.q_size), lambda c, b, t, *tables: (b, c, 0, q_block(b, t, *tables))
                ),
                documents
                and pl.BlockSpec((1, 1, call.q_size), lambda c, b, t, *tables: (b, 0, q_block(b, t, *tables))),
            ],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((q_count, call.q_size, _LANES), jnp.float32),
                pltpu.VMEM((call.k_size, _LANES), jnp.float32),
                pltpu.VMEM((call.k_size, _LANES), jnp.float32),
                pltpu.VMEM((q_count, call.heads, call.q_size), jnp.float32),
                [pltpu.VMEM((size, _LANES), qkv.dtype) for size in (call.q_size, call.k_size, call.k_size)],
                pltpu.SemaphoreType.DMA((3,)),
            ],
        ),
        out_shape=out_shape,
        # Rows of a batch are in order because the copies of one end under the next one's products.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=call.cost(5, packed, out, d_out, lse, out_shape),
        interpret=interpret,
        name="flash_attention_backward",
    )(
        *pairs, tables, scale.reshape(1), packed, packed, packed, _columns(d_out, 1), _columns(out, 1), lse,
        documents and documents.starts[:, None],
    )  # fmt: skip
    return _heads(d_qkv, 3, qkv.shape)
