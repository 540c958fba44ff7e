"""Flash attention for NVIDIA Hopper (sm_90a) in Pallas's Mosaic GPU.

In each block of threads two warpgroups compute, 64 rows each, and a third one loads for both. docs/kernels.md draws
the tiles, and who waits for whom.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from biomedlm_jax.devices import Device, current_device
from biomedlm_jax.kernels.documents import Documents
from biomedlm_jax.kernels.limits import array_limit

LOG2_E = math.log2(math.e)

ROWS = 64  # of a matrix instruction, and so of a warpgroup's part of a tile
WARPGROUPS = 2  # that compute
TILE = ROWS * WARPGROUPS

# A multiprocessor has 65,536 registers, of which 128 threads x (2 x 240 + 24) take all but 1,024.
COMPUTE_REGISTERS, LOAD_REGISTERS = 240, 24


_Roles = tuple[Callable[[], None], Callable[[Array], None]]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Columns of a block, and depth of each kernel's pipeline. A tile always has 128 rows."""

    forward_stages: int = 2
    forward_ping_pong: int = 1
    """Whether the two computing warpgroups take turns at the tensor cores: 1 or 0."""
    dq_keys: int = 64
    dq_stages: int = 2
    dkv_queries: int = 64
    dkv_stages: int = 3


def default_blocks(shape: tuple[int, ...], dtype: Any) -> Blocks:
    """Blocks that neither spill registers nor need more than the 227 KB of shared memory."""
    if shape[3] == 64:
        return Blocks(forward_stages=4)
    return Blocks()


def device_limit(device: Device) -> str:
    """Why the kernel does not run on the device; empty if it does."""
    if device.platform != "gpu" or device.capability != 9.0:
        return f"runs on NVIDIA Hopper (compute capability 9.0), and this is {device.kind}"
    return ""


def limit(qkv: Any) -> str:
    """Why the kernel does not take `qkv`, an array or its shape and type; empty if it does."""
    return array_limit(qkv, ("bfloat16", "float16"))


def forward(
    qkv: Float[Array, "batch seq 3*heads head_dim"],
    scale: Float[Array, ""],
    documents: Documents | None,
    blocks: Blocks,
    interpret: Any,
) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch heads padded_seq"]]:
    """The output, and the base-2 log-sum-exp of each row up to a whole tile.

    A tile of queries meets its keys from the diagonal block, the only one with a mask, down to the first.
    """
    ops = _Interpreted if interpret else _Compiled
    qkv, starts, _, seq = _whole_tiles(qkv, documents, interpret)
    batch, padded, heads3, head_dim = qkv.shape
    heads, dtype, stages = heads3 // 3, qkv.dtype, blocks.forward_stages
    grid = _Grid(batch, heads, pl.cdiv(seq, TILE), _multiprocessors(interpret))

    def kernel(
        qkv_ref: Any, scale_ref: Any, starts_ref: Any, out_ref: Any, lse_ref: Any, smem: Any, bars: Any
    ) -> _Roles:
        def steps_of(tile: Array, b: Array) -> Array:
            return tile + 1 if starts_ref is None else tile + 1 - lax.div(starts_ref[b, tile * TILE], TILE)

        def load() -> None:
            def load_tile(tile: Array, b: Array, h: Array, before: Array, place: Callable[[], Any]) -> Array:
                for w in range(WARPGROUPS):
                    plgpu.barrier_wait(bars.q_free.at[w])
                    rows = pl.ds(tile * TILE + w * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(qkv_ref.at[b, rows, h], smem.q.at[w], bars.q_ready.at[w])
                    if starts_ref is not None:
                        plgpu.copy_gmem_to_smem(starts_ref.at[b, rows], smem.starts.at[w], bars.q_ready.at[w])

                def load_block(step: Array, _: None) -> None:
                    slot = lax.rem(before + step, stages)
                    rows = pl.ds((tile - step) * TILE, TILE)
                    _load_keys(qkv_ref.at[b, rows], heads, h, slot, smem, bars)

                steps = steps_of(tile, b)
                lax.fori_loop(0, steps, load_block, None)
                return steps

            grid.for_each_tile(load_tile)
            _wait_for_all(bars.q_free, bars.k_free, bars.v_free)

        def compute(wg: Array) -> None:
            factor = _factor(scale_ref)
            q, out_smem, lse_smem = smem.q.at[wg], smem.out.at[wg], smem.lse.at[wg]
            plgpu.barrier_arrive(bars.q_free.at[wg])
            _arrive_at_all(bars.k_free, bars.v_free)
            if blocks.forward_ping_pong:
                pl.when(wg == 1)(lambda: plgpu.barrier_arrive(bars.turn.at[0]))

            def compute_tile(tile: Array, b: Array, h: Array, before: Array, place: Callable[[], Any]) -> Array:
                row = tile * TILE + wg * ROWS
                steps = steps_of(tile, b)

                def slot_of(step: Any) -> Array:
                    return lax.rem(before + step, stages)

                def softmax(s: Array, m: Array, step: Any, diagonal: bool) -> tuple[Array, Array, Array]:
                    """Probabilities against the new maximum, that maximum, and the factor of what came before."""
                    first_key = (tile - step) * TILE
                    first = None if start is None else start - first_key
                    s = _mask_keys(ops, smem, s, row - first_key, diagonal, first)
                    new_m = jnp.maximum(m, s.max(axis=1) * factor)
                    return jnp.exp2(s * factor - _along_rows(new_m, s.shape)), new_m, jnp.exp2(m - new_m)

                plgpu.barrier_wait(bars.q_ready.at[wg])
                start = None if starts_ref is None else ops.load(smem.starts.at[wg], ops.ROW)
                plgpu.barrier_wait(bars.k_ready.at[slot_of(0)])

                def diagonal_scores(s_acc: Any) -> Array:
                    ops.mma(s_acc, q, smem.k.at[slot_of(0)], transpose_b=True)
                    return ops.read(s_acc)

                s = ops.with_accumulators(diagonal_scores, (ROWS, TILE))
                plgpu.barrier_arrive(bars.k_free.at[slot_of(0)])
                p, m, _ = softmax(s, ops.full((ROWS,), -jnp.inf), 0, diagonal=True)
                row_sum = p.sum(axis=1)
                out = ops.full((ROWS, head_dim), 0)

                def block(step: Array, carry: Any) -> Any:
                    out, p, m, row_sum = carry
                    plgpu.barrier_wait(bars.k_ready.at[slot_of(step)])
                    plgpu.barrier_wait(bars.v_ready.at[slot_of(step - 1)])
                    if blocks.forward_ping_pong:
                        plgpu.barrier_wait(bars.turn.at[wg])

                    def products(out_acc: Any, p: Any, next_p: Any, m: Any, row_sum: Any, alpha: Any) -> None:
                        def scores(s_acc: Any) -> Array:
                            ops.mma(s_acc, q, smem.k.at[slot_of(step)], transpose_b=True)
                            ops.mma(out_acc, p[...], smem.v.at[slot_of(step - 1)])
                            if blocks.forward_ping_pong:
                                plgpu.barrier_arrive(bars.turn.at[1 - wg])
                            return ops.read(s_acc, pending=1)

                        s = ops.with_accumulators(scores, (ROWS, TILE))
                        plgpu.barrier_arrive(bars.k_free.at[slot_of(step)])
                        # This softmax runs beside the product of the last block's probabilities. Left alone, ptxas
                        # moves the exponentials past the wait for that product; past a store it moves no wait.
                        new_p, new_m, new_alpha = softmax(s, m[...], step, diagonal=False)
                        new_sum = row_sum[...] * new_alpha + new_p.sum(axis=1)
                        smem.sums.at[wg][...] = new_sum
                        next_p[...], m[...], row_sum[...], alpha[...] = lax.optimization_barrier(
                            (new_p, new_m, new_sum, new_alpha)
                        )

                    out, _, p, m, row_sum, alpha = ops.run_state(
                        products, out, p, ops.full((ROWS, TILE), 0), m, row_sum, row_sum
                    )
                    plgpu.barrier_arrive(bars.v_free.at[slot_of(step - 1)])
                    # Rounded only now: the product was still reading the registers of the last probabilities.
                    p = lax.optimization_barrier(p).astype(dtype)
                    return out * _along_rows(alpha, out.shape), p, m, row_sum

                out, p, m, row_sum = lax.fori_loop(1, steps, block, (out, p.astype(dtype), m, row_sum))
                plgpu.barrier_arrive(bars.q_free.at[wg])
                last = slot_of(steps - 1)
                plgpu.barrier_wait(bars.v_ready.at[last])
                (out,) = ops.run_state(lambda out_acc: ops.mma(out_acc, p, smem.v.at[last]), out)
                plgpu.barrier_arrive(bars.v_free.at[last])

                tile, b, h = place()
                row = tile * TILE + wg * ROWS
                # The last tile's store ran under this one's products; this one's runs under the next.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[...] = (out * _along_rows(1 / row_sum, out.shape)).astype(dtype)
                lse_smem[...] = m + jnp.log(row_sum) * LOG2_E
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem, out_ref.at[b, pl.ds(row, ROWS), h])
                plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[b, h, pl.ds(row, ROWS)])
                return steps

            grid.for_each_tile(compute_tile)
            if blocks.forward_ping_pong:
                pl.when(wg == 0)(lambda: plgpu.barrier_wait(bars.turn.at[0]))

        return load, compute

    tile = functools.partial(_swizzled, dtype)
    smem = {
        "q": tile(WARPGROUPS, ROWS, head_dim),
        "k": tile(stages, TILE, head_dim),
        "v": tile(stages, TILE, head_dim),
        "out": tile(WARPGROUPS, ROWS, head_dim),
        "sums": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "lse": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "starts": plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
    }
    bars = {
        "q_ready": plgpu.Barrier(num_arrivals=1 if starts is None else 2, num_barriers=WARPGROUPS),
        "k_ready": plgpu.Barrier(num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "q_free": plgpu.Barrier(num_barriers=WARPGROUPS),
        "k_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        "turn": plgpu.Barrier(num_barriers=WARPGROUPS),
    }
    out_type = (
        jax.ShapeDtypeStruct((batch, padded, heads, head_dim), dtype),
        jax.ShapeDtypeStruct((batch, heads, grid.tiles * TILE), jnp.float32),
    )
    out, lse = _call("flash_attention", kernel, grid, smem, bars, interpret, out_type)(qkv, scale[None], starts)
    return out[:, :seq], lse


def backward(
    qkv: Float[Array, "batch seq 3*heads head_dim"],
    scale: Float[Array, ""],
    documents: Documents | None,
    out: Float[Array, "batch seq heads head_dim"],
    lse: Float[Array, "batch heads padded_seq"],
    d_out: Float[Array, "batch seq heads head_dim"],
    blocks: Blocks,
    interpret: Any,
) -> Float[Array, "batch seq 3*heads head_dim"]:
    """The gradient of `qkv`, in one buffer that two kernels fill: queries', then keys' and values'.

    Each tile is summed by one block of threads in a fixed order, so that the gradient is the same in every run.
    """
    qkv, starts, ends, seq = _whole_tiles(qkv, documents, interpret)
    out, d_out = (_pad_rows(x, qkv.shape[1]) for x in (out, d_out))
    grid = _Grid(qkv.shape[0], qkv.shape[2] // 3, pl.cdiv(seq, TILE), _multiprocessors(interpret))
    d_qkv, delta = _backward_dq(qkv, scale, starts, out, lse, d_out, grid, blocks, interpret)
    d_qkv = _backward_dkv(d_qkv, qkv, scale, ends, lse, delta, d_out, grid, blocks, interpret)
    return d_qkv[:, :seq]


def _backward_dq(
    qkv: Array,
    scale: Array,
    starts: Array | None,
    out: Array,
    lse: Array,
    d_out: Array,
    grid: "_Grid",
    blocks: Blocks,
    interpret: Any,
) -> tuple[Array, Array]:
    """A packed gradient with only the queries' part written, and delta = sum(out * d_out) of each row."""
    ops = _Interpreted if interpret else _Compiled
    heads, head_dim, dtype = grid.heads, qkv.shape[3], qkv.dtype
    keys, stages = blocks.dq_keys, blocks.dq_stages
    diagonal = TILE // keys  # blocks on the diagonal of a tile

    def kernel(
        qkv_ref: Any,
        scale_ref: Any,
        starts_ref: Any,
        out_ref: Any,
        lse_ref: Any,
        d_out_ref: Any,
        d_qkv_ref: Any,
        delta_ref: Any,
        smem: Any,
        bars: Any,
    ) -> _Roles:
        def steps_of(tile: Array, b: Array) -> Array:
            steps = (tile + 1) * diagonal
            return steps if starts_ref is None else steps - lax.div(starts_ref[b, tile * TILE], keys)

        def rows_of(tile: Array, step: Array) -> Any:
            return pl.ds(((tile + 1) * diagonal - 1 - step) * keys, keys)

        def load() -> None:
            def load_tile(tile: Array, b: Array, h: Array, before: Array, place: Callable[[], Any]) -> Array:
                for w in range(WARPGROUPS):
                    rows = pl.ds(tile * TILE + w * ROWS, ROWS)
                    plgpu.barrier_wait(bars.d_out_free.at[w])
                    plgpu.copy_gmem_to_smem(d_out_ref.at[b, rows, h], smem.d_out.at[w], bars.d_out_ready.at[w])
                    plgpu.copy_gmem_to_smem(out_ref.at[b, rows, h], smem.out.at[w], bars.d_out_ready.at[w])
                    plgpu.copy_gmem_to_smem(lse_ref.at[b, h, rows], smem.lse.at[w], bars.d_out_ready.at[w])
                    plgpu.barrier_wait(bars.q_free.at[w])
                    plgpu.copy_gmem_to_smem(qkv_ref.at[b, rows, h], smem.q.at[w], bars.q_ready.at[w])
                    if starts_ref is not None:
                        plgpu.copy_gmem_to_smem(starts_ref.at[b, rows], smem.starts.at[w], bars.q_ready.at[w])

                def load_block(step: Array, _: None) -> None:
                    slot = lax.rem(before + step, stages)
                    rows = rows_of(tile, step)
                    _load_keys(qkv_ref.at[b, rows], heads, h, slot, smem, bars)

                steps = steps_of(tile, b)
                lax.fori_loop(0, steps, load_block, None)
                return steps

            grid.for_each_tile(load_tile)
            _wait_for_all(bars.q_free, bars.d_out_free, bars.k_free, bars.v_free)

        def compute(wg: Array) -> None:
            factor = _factor(scale_ref)
            q, d_out = smem.q.at[wg], smem.d_out.at[wg]
            plgpu.barrier_arrive(bars.q_free.at[wg])
            plgpu.barrier_arrive(bars.d_out_free.at[wg])
            _arrive_at_all(bars.k_free, bars.v_free)

            def compute_tile(tile: Array, b: Array, h: Array, before: Array, place: Callable[[], Any]) -> Array:
                row = tile * TILE + wg * ROWS
                steps = steps_of(tile, b)
                plgpu.barrier_wait(bars.d_out_ready.at[wg])
                lse = ops.load(smem.lse.at[wg], ops.ROW)
                out_values, d_out_values = (ops.load(x, ops.MATRIX) for x in (smem.out.at[wg], d_out))
                delta = (out_values.astype(jnp.float32) * d_out_values.astype(jnp.float32)).sum(axis=1)
                plgpu.barrier_wait(bars.q_ready.at[wg])
                start = None if starts_ref is None else ops.load(smem.starts.at[wg], ops.ROW)

                def skip(step: int) -> None:
                    slot = lax.rem(before + step, stages)
                    plgpu.barrier_wait(bars.k_ready.at[slot])
                    plgpu.barrier_wait(bars.v_ready.at[slot])
                    plgpu.barrier_arrive(bars.k_free.at[slot])
                    plgpu.barrier_arrive(bars.v_free.at[slot])

                def block(step: Array, d_q: Array, masked: bool) -> Array:
                    slot = lax.rem(before + step, stages)
                    plgpu.barrier_wait(bars.k_ready.at[slot])
                    plgpu.barrier_wait(bars.v_ready.at[slot])

                    def probabilities(s_acc: Any, d_p_acc: Any) -> tuple[Array, Array]:
                        ops.mma(s_acc, q, smem.k.at[slot], transpose_b=True)
                        ops.mma(d_p_acc, d_out, smem.v.at[slot], transpose_b=True)
                        s = ops.read(s_acc, pending=1)
                        first_key = rows_of(tile, step).start
                        first = None if start is None else start - first_key
                        s = _mask_keys(ops, smem, s, row - first_key, masked, first)
                        p = jnp.exp2(s * factor - _along_rows(lse, s.shape))
                        return p, ops.read(d_p_acc)

                    p, d_p = ops.with_accumulators(probabilities, (ROWS, keys), (ROWS, keys))
                    plgpu.barrier_arrive(bars.v_free.at[slot])
                    d_s = (p * (d_p - _along_rows(delta, p.shape))).astype(dtype)
                    (d_q,) = ops.run_state(lambda d_q_acc: ops.mma(d_q_acc, d_s, smem.k.at[slot]), d_q)
                    plgpu.barrier_arrive(bars.k_free.at[slot])
                    return d_q

                # Blocks past the warpgroup's own diagonal are the other's.
                own = lax.div((WARPGROUPS - 1 - wg) * ROWS, keys)
                for step in range(diagonal - 1):
                    pl.when(step < own)(functools.partial(skip, step))
                d_q = block(own, ops.full((ROWS, head_dim), 0), masked=True)
                d_q = lax.fori_loop(own + 1, steps, functools.partial(block, masked=False), d_q)

                tile, b, h = place()
                row = tile * TILE + wg * ROWS
                # The queries' place in shared memory serves their gradient.
                q[...] = (d_q * scale_ref[0]).astype(dtype)
                smem.delta.at[wg][...] = delta
                plgpu.commit_smem()
                plgpu.barrier_arrive(bars.d_out_free.at[wg])
                plgpu.copy_smem_to_gmem(q, d_qkv_ref.at[b, pl.ds(row, ROWS), h])
                plgpu.copy_smem_to_gmem(smem.delta.at[wg], delta_ref.at[b, h, pl.ds(row, ROWS)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(bars.q_free.at[wg])
                return steps

            grid.for_each_tile(compute_tile)

        return load, compute

    tile = functools.partial(_swizzled, dtype)
    smem = {
        "q": tile(WARPGROUPS, ROWS, head_dim),
        "out": tile(WARPGROUPS, ROWS, head_dim),
        "d_out": tile(WARPGROUPS, ROWS, head_dim),
        "k": tile(stages, keys, head_dim),
        "v": tile(stages, keys, head_dim),
        "lse": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "delta": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "starts": plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
    }
    bars = {
        "q_ready": plgpu.Barrier(num_arrivals=1 if starts is None else 2, num_barriers=WARPGROUPS),
        "d_out_ready": plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
        "k_ready": plgpu.Barrier(num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "q_free": plgpu.Barrier(num_barriers=WARPGROUPS),
        "d_out_free": plgpu.Barrier(num_barriers=WARPGROUPS),
        "k_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }
    out_type = (jax.ShapeDtypeStruct(qkv.shape, dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32))
    call = _call("flash_attention_dq", kernel, grid, smem, bars, interpret, out_type)
    return call(qkv, scale[None], starts, out, lse, d_out)


def _backward_dkv(
    d_qkv: Array,
    qkv: Array,
    scale: Array,
    ends: Array | None,
    lse: Array,
    delta: Array,
    d_out: Array,
    grid: "_Grid",
    blocks: Blocks,
    interpret: Any,
) -> Array:
    """Writes the keys' and values' parts of the packed gradient; scores are transposed, [keys, queries]."""
    ops = _Interpreted if interpret else _Compiled
    heads, head_dim, dtype = grid.heads, qkv.shape[3], qkv.dtype
    queries, stages = blocks.dkv_queries, blocks.dkv_stages
    diagonal = TILE // queries  # blocks on the diagonal of a tile

    def kernel(
        qkv_ref: Any,
        scale_ref: Any,
        ends_ref: Any,
        lse_ref: Any,
        delta_ref: Any,
        d_out_ref: Any,
        d_qkv_ref: Any,
        smem: Any,
        bars: Any,
    ) -> _Roles:
        def steps_of(tile: Array, b: Array) -> Array:
            if ends_ref is None:
                return (grid.tiles - tile) * diagonal
            return lax.div(ends_ref[b, (tile + 1) * TILE - 1] + queries - 1, queries) - tile * diagonal

        def load() -> None:
            def load_tile(tile: Array, b: Array, h: Array, before: Array, place: Callable[[], Any]) -> Array:
                for w in range(WARPGROUPS):
                    rows = pl.ds(tile * TILE + w * ROWS, ROWS)
                    plgpu.barrier_wait(bars.kv_free.at[w])
                    plgpu.copy_gmem_to_smem(qkv_ref.at[b, rows, heads + h], smem.k.at[w], bars.kv_ready.at[w])
                    plgpu.copy_gmem_to_smem(qkv_ref.at[b, rows, 2 * heads + h], smem.v.at[w], bars.kv_ready.at[w])
                    if ends_ref is not None:
                        plgpu.copy_gmem_to_smem(ends_ref.at[b, rows], smem.ends.at[w], bars.kv_ready.at[w])

                def load_block(step: Array, _: None) -> None:
                    slot = lax.rem(before + step, stages)
                    rows = pl.ds(tile * TILE + step * queries, queries)
                    ready = bars.q_ready.at[slot]
                    plgpu.barrier_wait(bars.q_free.at[slot])
                    plgpu.copy_gmem_to_smem(qkv_ref.at[b, rows, h], smem.q.at[slot], ready)
                    plgpu.copy_gmem_to_smem(lse_ref.at[b, h, rows], smem.lse.at[slot], ready)
                    plgpu.copy_gmem_to_smem(d_out_ref.at[b, rows, h], smem.d_out.at[slot], ready)
                    plgpu.copy_gmem_to_smem(delta_ref.at[b, h, rows], smem.delta.at[slot], ready)

                steps = steps_of(tile, b)
                lax.fori_loop(0, steps, load_block, None)
                return steps

            grid.for_each_tile(load_tile)
            _wait_for_all(bars.kv_free, bars.q_free)

        def compute(wg: Array) -> None:
            factor = _factor(scale_ref)
            k, v = smem.k.at[wg], smem.v.at[wg]
            plgpu.barrier_arrive(bars.kv_free.at[wg])
            _arrive_at_all(bars.q_free)

            def compute_tile(tile: Array, b: Array, h: Array, before: Array, place: Callable[[], Any]) -> Array:
                row = tile * TILE + wg * ROWS
                steps = steps_of(tile, b)
                plgpu.barrier_wait(bars.kv_ready.at[wg])
                end = None if ends_ref is None else ops.load(smem.ends.at[wg], ops.ROW)

                def skip(step: int) -> None:
                    slot = lax.rem(before + step, stages)
                    plgpu.barrier_wait(bars.q_ready.at[slot])
                    plgpu.barrier_arrive(bars.q_free.at[slot])

                def block(step: Array, carry: Any, masked: bool) -> Any:
                    d_k, d_v = carry
                    slot = lax.rem(step, stages)
                    first_query = tile * TILE + (step - before) * queries
                    plgpu.barrier_wait(bars.q_ready.at[slot])

                    def probabilities(d_p_acc: Any, p: Any) -> None:
                        # Told here once more where they lie, lest the addresses of all their parts fill registers.
                        here = lax.optimization_barrier(wg)

                        def scores(s_acc: Any) -> Array:
                            ops.mma(s_acc, smem.k.at[here], smem.q.at[slot], transpose_b=True)
                            ops.mma(d_p_acc, smem.v.at[here], smem.d_out.at[slot], transpose_b=True)
                            return ops.read(s_acc, pending=1)

                        s = ops.with_accumulators(scores, (ROWS, queries))
                        if masked:
                            s = jnp.where(
                                _column_index(ops, smem, s.shape) >= _row_index(ops, smem, s.shape, row - first_query),
                                s,
                                -jnp.inf,
                            )
                        if end is not None:
                            s = jnp.where(
                                _column_index(ops, smem, s.shape) < _along_rows(end - first_query, s.shape), s, -jnp.inf
                            )
                        lse = ops.load(smem.lse.at[slot], ops.COLUMN)
                        p[...] = jnp.exp2(s * factor - _along_columns(lse, s.shape))

                    # An accumulator that begins at -delta needs no registers for delta beside it.
                    delta = ops.load(smem.delta.at[slot], ops.COLUMN)
                    d_p, p = ops.run_state(
                        probabilities, -_along_columns(delta, (ROWS, queries)), ops.full((ROWS, queries), 0)
                    )
                    d_s = (p * d_p).astype(dtype)
                    p = p.astype(dtype)

                    def products(d_k_acc: Any, d_v_acc: Any) -> None:
                        ops.mma(d_v_acc, p, smem.d_out.at[slot])
                        ops.mma(d_k_acc, d_s, smem.q.at[slot])

                    d_k, d_v = ops.run_state(products, d_k, d_v, accumulators=2)
                    plgpu.barrier_arrive(bars.q_free.at[slot])
                    return d_k, d_v

                # Blocks before the warpgroup's own diagonal are the other's.
                own = lax.div(wg * ROWS, queries)
                for step in range(diagonal - 1):
                    pl.when(step < own)(functools.partial(skip, step))
                zero = ops.full((ROWS, head_dim), 0)
                carry = block(before + own, (zero, zero), masked=True)
                d_k, d_v = lax.fori_loop(
                    before + own + 1, before + steps, functools.partial(block, masked=False), carry
                )

                tile, b, h = place()
                row = tile * TILE + wg * ROWS
                # The keys' and values' places in shared memory serve their gradients.
                k[...] = (d_k * scale_ref[0]).astype(dtype)
                v[...] = d_v.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(k, d_qkv_ref.at[b, pl.ds(row, ROWS), heads + h])
                plgpu.copy_smem_to_gmem(v, d_qkv_ref.at[b, pl.ds(row, ROWS), 2 * heads + h])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(bars.kv_free.at[wg])
                return steps

            grid.for_each_tile(compute_tile)

        return load, compute

    tile = functools.partial(_swizzled, dtype)
    smem = {
        "k": tile(WARPGROUPS, ROWS, head_dim),
        "v": tile(WARPGROUPS, ROWS, head_dim),
        "q": tile(stages, queries, head_dim),
        "d_out": tile(stages, queries, head_dim),
        "lse": plgpu.SMEM((stages, queries), jnp.float32),
        "delta": plgpu.SMEM((stages, queries), jnp.float32),
        "ends": plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
    }
    bars = {
        "kv_ready": plgpu.Barrier(num_arrivals=2 if ends is None else 3, num_barriers=WARPGROUPS),
        "q_ready": plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        "kv_free": plgpu.Barrier(num_barriers=WARPGROUPS),
        "q_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }
    d_qkv_ref = jax.new_ref(d_qkv, memory_space=plgpu.GMEM)
    call = _call("flash_attention_dkv", kernel, grid, smem, bars, interpret)
    call(qkv, scale[None], ends, lse, delta, d_out, d_qkv_ref)
    return jax.freeze(d_qkv_ref)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Tiles of all heads and rows of the batch, over as many blocks of threads as the device has multiprocessors.

    A tile's work grows (or shrinks) with its place in the row, so tile n - 1 - i is done together with tile i: all
    pairs are equal work. The pairs of a head lie side by side, so that its keys and values are read from the L2 cache.
    """

    batch: int
    heads: int
    tiles: int
    multiprocessors: int

    @property
    def pairs(self) -> int:
        return pl.cdiv(self.tiles, 2)

    @property
    def size(self) -> int:
        """Blocks of threads."""
        return min(self.multiprocessors, self.batch * self.heads * self.pairs)

    def for_each_tile(self, body: Callable[..., Array]) -> None:
        """Runs body(tile, row of the batch, head, steps before, place), which returns its own steps.

        place() says tile, row and head once more: a body that asks it after its loop holds them in no registers there.
        """
        cta, size = lax.axis_index("cta"), self.size

        def place(t: Array) -> tuple[Array, Array, Array]:
            item = cta + lax.div(t, 2) * size
            pair, row = lax.rem(item, self.pairs), lax.div(item, self.pairs)
            tile = jnp.where(lax.rem(t, 2) == 0, 2 * self.pairs - 1 - pair, pair)
            return tile, lax.div(row, self.heads), lax.rem(row, self.heads)

        def run(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            t, before = carry
            tile, b, h = place(t)
            run_tile = functools.partial(body, tile, b, h, before, lambda: place(lax.optimization_barrier(t)))
            # Of an odd number of tiles the first pair has only one.
            return t + 1, before + lax.cond(tile < self.tiles, run_tile, lambda: jnp.int32(0))

        items = self.batch * self.heads * self.pairs
        lax.while_loop(lambda carry: cta + lax.div(carry[0], 2) * size < items, run, (jnp.int32(0), jnp.int32(0)))


def _multiprocessors(interpret: Any) -> int:
    # Each block of threads is three of the interpreter's threads, and all of them wait for one another.
    return 1 if interpret else current_device().cores or 132


def _call(
    name: str, kernel: Callable[..., _Roles], grid: _Grid, smem: Any, bars: Any, interpret: Any, out_type: Any = ()
) -> Callable[..., Any]:
    """A function that runs the kernel on its operands, of which some may be None, and on references to be written.

    The kernel gives what its warpgroups do: load() of the one, and compute(number) of the others.
    """
    mesh = plgpu.Mesh(grid=(grid.size,), grid_names=("cta",), num_threads=WARPGROUPS + 1, thread_name="wg")
    # The kernels say which layout each array has. What is the default differs between releases of JAX.
    # Sums along a row stay inside a warp, so they need no shared memory.
    params = plgpu.CompilerParams(
        approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
    )

    interpreter = _interpreter() if interpret is True else interpret
    smem = smem | {"index": plgpu.SMEM((TILE,), jnp.int32)}

    def run(*operands: Any) -> Any:
        given, structure = jax.tree.flatten(operands)

        def body(index_ref: Any, *refs: Any) -> None:
            inputs = jax.tree.unflatten(structure, refs[: len(given)])

            def scoped(smem: dict[str, Any], bars: dict[str, Any], index_ready: Any) -> None:
                load, compute = kernel(*inputs, *refs[len(given) :], SimpleNamespace(**smem), SimpleNamespace(**bars))
                wg = lax.axis_index("wg")

                @pl.when(wg == WARPGROUPS)
                def _load() -> None:
                    plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
                    plgpu.copy_gmem_to_smem(index_ref, smem["index"], index_ready)
                    load()

                @pl.when(wg < WARPGROUPS)
                def _compute() -> None:
                    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
                    plgpu.barrier_wait(index_ready)
                    compute(wg)
                    plgpu.wait_smem_to_gmem(0)

            pl.run_scoped(scoped, smem, bars, plgpu.Barrier(), collective_axes="wg")

        launch = pl.kernel(body, out_type, mesh=mesh, compiler_params=params, interpret=interpreter, name=name)
        return launch(jnp.arange(TILE, dtype=jnp.int32), *given)

    return run


def _swizzled(dtype: Any, *shape: int) -> Any:
    """Shared memory as the tensor cores read it: eight rows of 128 bytes."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _whole_tiles(
    qkv: Array, documents: Documents | None, interpret: Any
) -> tuple[Array, Array | None, Array | None, int]:
    """Operands as the kernels take them, and the length of a row.

    Tiles may reach past the end of a row: TMA reads zeros there, and writes nothing. Only a length that is no multiple
    of its tiles' 8 rows costs a padded copy. Pallas's interpreter does not know this, and gets whole tiles.
    """
    seq = qkv.shape[1]
    padded = pl.cdiv(seq, TILE) * TILE
    qkv = _pad_rows(qkv, padded if interpret else pl.cdiv(seq, 8) * 8)
    if documents is None:
        return qkv, None, None, seq
    rest = ((0, 0), (0, padded - seq))
    starts = jnp.pad(documents.starts, rest, mode="edge")
    return qkv, starts, jnp.pad(documents.ends, rest, constant_values=padded), seq


def _pad_rows(x: Array, seq: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, seq - x.shape[1]), (0, 0), (0, 0))) if seq > x.shape[1] else x


def _load_keys(rows_ref: Any, heads: int, h: Array, slot: Array, smem: Any, bars: Any) -> None:
    """Fills a slot of the rings of keys and values, once each is free, from rows of the packed projection."""
    plgpu.barrier_wait(bars.k_free.at[slot])
    plgpu.copy_gmem_to_smem(rows_ref.at[:, heads + h], smem.k.at[slot], bars.k_ready.at[slot])
    plgpu.barrier_wait(bars.v_free.at[slot])
    plgpu.copy_gmem_to_smem(rows_ref.at[:, 2 * heads + h], smem.v.at[slot], bars.v_ready.at[slot])


def _mask_keys(ops: Any, smem: Any, s: Array, ahead: Array, diagonal: bool, start: Array | None) -> Array:
    """Scores [queries, keys] without those of keys after their query, or before its document.

    Args:
      ops: `_Compiled` or `_Interpreted`.
      smem: shared memory.
      s: the scores.
      ahead: position of the first query minus that of the first key.
      diagonal: whether some keys come after some queries.
      start: where each query's document begins, minus the position of the first key; None without documents.
    """
    if diagonal:
        s = jnp.where(_column_index(ops, smem, s.shape) <= _row_index(ops, smem, s.shape, ahead), s, -jnp.inf)
    if start is not None:
        s = jnp.where(_column_index(ops, smem, s.shape) >= _along_rows(start, s.shape), s, -jnp.inf)
    return s


def _row_index(ops: Any, smem: Any, shape: tuple[int, ...], first: Array) -> Array:
    """first + index of the row, for each element of a matrix.

    Indices come from shared memory: the compiler would compute an iota ahead of all loops, and hold it in registers
    that the loops need.
    """
    return _along_rows(ops.load(smem.index.at[pl.ds(0, shape[0])], ops.ROW) + first, shape)


def _column_index(ops: Any, smem: Any, shape: tuple[int, ...]) -> Array:
    """Index of the column, for each element of a matrix."""
    return _along_columns(ops.load(smem.index.at[pl.ds(0, shape[1])], ops.COLUMN), shape)


def _factor(scale_ref: Any) -> Array:
    """What takes scores to base-2 exponents.

    Masked scores are -inf, and times 0 they would not be. The largest score only bounds the exponents of a scale that
    is not negative; of another one the result is nan.
    """
    scale = scale_ref[0]
    return jnp.where(scale >= 0, jnp.maximum(scale * LOG2_E, 1e-30), jnp.nan)


def _along_rows(x: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(x, shape, [0])


def _along_columns(x: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(x, shape, [1])


def _arrive_at_all(*barriers: Any) -> None:
    for barrier in barriers:
        for i in range(barrier.shape[0]):
            plgpu.barrier_arrive(barrier.at[i])


def _wait_for_all(*barriers: Any) -> None:
    """What was freed last is not filled again; without this wait the barriers would end in the middle of a phase."""
    for barrier in barriers:
        for i in range(barrier.shape[0]):
            plgpu.barrier_wait(barrier.at[i])


def _interpreter() -> Any:
    # Public since JAX 0.11.
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


class _Compiled:
    """Operations that the compiler and the interpreter need in different words: for the compiler."""

    MATRIX = plgpu.Layout.WGMMA
    ROW = plgpu.Layout.WGMMA.reduce(1)  # a number for each row of a matrix
    COLUMN = plgpu.Layout.WGMMA.reduce(0)

    @classmethod
    def full(cls, shape: tuple[int, ...], value: float) -> Array:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), cls.MATRIX if len(shape) == 2 else cls.ROW)

    @staticmethod
    def load(ref: Any, layout: Any) -> Array:
        return plgpu.layout_cast(ref[...], layout)

    @staticmethod
    def mma(acc: Any, a: Any, b: Any, transpose_b: bool = False) -> None:
        """acc += a @ b, asynchronous."""
        plgpu.wgmma(acc, a, b.T if transpose_b else b)

    @staticmethod
    def read(acc: Any, pending: int = 0) -> Array:
        """The accumulator's value, once no more than `pending` products are under way."""
        return plgpu.wgmma_accumulator_load(acc, wait_n=pending)

    @staticmethod
    def with_accumulators(body: Callable[..., Any], *shapes: tuple[int, int]) -> Any:
        """body(accumulators that begin at 0)."""
        return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    @staticmethod
    def run_state(body: Callable[..., None], *values: Array, accumulators: int = 1) -> Any:
        """Values as body(references to them) leaves them, all products done; the first ones are accumulators."""
        initial = (*map(plgpu.ACC.init, values[:accumulators]), *values[accumulators:])
        return pl.run_state(lambda refs: body(*refs))(initial)


class _Interpreted:
    """The same for Pallas's GPU interpreter, which knows neither layouts nor all forms of the matrix product."""

    MATRIX = ROW = COLUMN = None

    class Value:
        """A value that is read and written like a reference."""

        def __init__(self, value: Array):
            self.value = value

        def __getitem__(self, _: Any) -> Array:
            return self.value

        def __setitem__(self, _: Any, value: Array) -> None:
            self.value = value

    @staticmethod
    def full(shape: tuple[int, ...], value: float) -> Array:
        return jnp.full(shape, value, jnp.float32)

    @staticmethod
    def load(ref: Any, layout: Any) -> Array:
        value = ref[...]
        # Reads of the tensor cores are ordered with TMA's writes; the interpreter's need a fence.
        plgpu.commit_smem()
        return value

    @classmethod
    def mma(cls, acc: Value, a: Any, b: Any, transpose_b: bool = False) -> None:
        a = a if isinstance(a, jax.Array) else cls.load(a, None)
        b = cls.load(b, None)
        acc[...] += jnp.dot(a, b.T if transpose_b else b, preferred_element_type=jnp.float32)

    @staticmethod
    def read(acc: Value, pending: int = 0) -> Array:
        return acc[...]

    @classmethod
    def with_accumulators(cls, body: Callable[..., Any], *shapes: tuple[int, int]) -> Any:
        return body(*(cls.Value(jnp.zeros(shape, jnp.float32)) for shape in shapes))

    @classmethod
    def run_state(cls, body: Callable[..., None], *values: Array, accumulators: int = 1) -> Any:
        refs = tuple(map(cls.Value, values))
        body(*refs)
        return tuple(ref.value for ref in refs)
