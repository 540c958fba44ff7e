"""Causal flash attention over one packed projection: one `custom_vjp` over the kernels of three compilers.

Each backend is a module of this package with
  - `Blocks`: its block sizes, a frozen dataclass of integers;
  - `default_blocks(shape, dtype)`: those that compile for every device that the backend serves;
  - `device_limit(device)`: why it does not run on that device; empty if it does;
  - `limit(qkv)`: why it does not take an array of this shape and type; empty if it does;
  - `forward(qkv, scale, documents, blocks, interpret)`: the output, and what the backward pass needs of the
    softmax (the base-2 log-sum-exp of each row);
  - `backward(qkv, scale, documents, out, lse, d_out, blocks, interpret)`: the gradient, packed as `qkv` is.
"""

import functools
import importlib
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from biomedlm_jax.devices import Device, current_device
from biomedlm_jax.errors import UserError
from biomedlm_jax.kernels import block_sizes
from biomedlm_jax.kernels.documents import Documents, documents

Backend = Literal["triton", "mosaic_gpu", "mosaic_tpu"]

# In order of preference where several serve a device.
BACKENDS: tuple[Backend, ...] = ("mosaic_gpu", "triton", "mosaic_tpu")

MAX_SEQ = 16_384

# What a checkpoint policy may save, so that recomputing a block does not run the forward kernel again.
CHECKPOINT_NAME = "flash_attention"


class _Kernel(NamedTuple):
    """All that is static about a call."""

    backend: Backend
    blocks: Any
    rows: P | None
    interpret: Any


def flash_attention(
    qkv: Float[Array, "batch seq 3*heads head_dim"],
    scale: Float[Array, ""] | float,
    segment_ids: Int[Array, "batch seq"] | None = None,
    *,
    backend: Backend | None = None,
    blocks: Any = None,
    rows: P | None = None,
    interpret: Any = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention of each position over itself and those before it, in memory linear in `seq`.

    The backward pass is deterministic. It also gives the gradient of `scale` (nan where that is 0).

    Args:
      qkv: queries, keys and values of all heads, in this order along the third axis.
      scale: factor of the scores, applied to them in float32; may be traced (it differs by layer under a scan).
      segment_ids: documents packed in a row, as runs of equal ids, which do not attend to each other.
      backend: a kernel's name; by default the best that serves the device and the array.
      blocks: the backend's `Blocks`; by default as tuned for the device and the shape.
      rows: how the batch axis lies on the mesh set by `jax.set_mesh`; each device then runs the kernel on its rows.
      interpret: runs the kernel in Pallas's interpreter: true, or the interpreter's parameters.

    Raises:
      UserError: no kernel, or not the one asked for, takes these arguments; says which limit was passed.
    """
    _check_shape(qkv)
    scale = _check_scale(scale)
    if segment_ids is not None and (
        segment_ids.shape != qkv.shape[:2] or not jnp.issubdtype(segment_ids.dtype, jnp.integer)
    ):
        raise UserError(
            f"flash attention: segment_ids must be integers of shape {qkv.shape[:2]}, not {segment_ids.dtype} of "
            f"shape {segment_ids.shape}"
        )
    device = current_device()
    backend = choose_backend(qkv, device, backend, bool(interpret))
    if blocks is None:
        blocks = block_sizes.lookup(backend, device.kind, qkv.shape, qkv.dtype)
    bounds = None if segment_ids is None else documents(segment_ids)
    return _attention(_Kernel(backend, blocks, rows, interpret), qkv, scale, bounds)


def choose_backend(qkv: Any, device: Device, backend: Backend | None = None, interpreted: bool = False) -> Backend:
    """The kernel that takes `qkv`, an array or its shape and type, on the device: `backend` itself, if it is given.

    Raises:
      UserError: there is none; says which limits were passed.
    """
    limits = {}
    for name in BACKENDS if backend is None else (backend,):
        module = _module(name)
        limits[name] = ("" if interpreted else module.device_limit(device)) or module.limit(qkv)
        if not limits[name]:
            return name
    # What a kernel for another kind of device would say of the array does not matter.
    there = {name: limit for name, limit in limits.items() if interpreted or not _module(name).device_limit(device)}
    if not there and backend is None:
        raise UserError(
            f"flash attention runs on NVIDIA GPUs from Ampere (compute capability 8.0) on and on TPUs from v4 on, and "
            f"this is {device.kind}"
        )
    raise UserError(
        "flash attention: " + "; ".join(f"the {name} kernel {limit}" for name, limit in (there or limits).items())
    )


def _check_shape(qkv: Any) -> None:
    if qkv.ndim != 4 or qkv.shape[2] % 3 or 0 in qkv.shape:
        raise UserError(
            f"flash attention: qkv must be [batch, seq, 3 * heads, head_dim], none of them 0, not {list(qkv.shape)}"
        )
    if qkv.shape[1] > MAX_SEQ:
        raise UserError(f"flash attention takes up to {MAX_SEQ} positions a row, not {qkv.shape[1]}")


def _check_scale(scale: Any) -> Float[Array, ""]:
    if not isinstance(scale, jax.core.Tracer) and (jnp.ndim(scale) or not math.isfinite(scale)):
        raise UserError(f"flash attention: scale must be one finite number, not {scale}")
    if jnp.ndim(scale):
        raise UserError(f"flash attention: scale must be one number, not an array of shape {jnp.shape(scale)}")
    return jnp.asarray(scale, jnp.float32)


def _module(backend: Backend) -> Any:
    # Imported when needed: a machine without GPUs need not load their compilers.
    return importlib.import_module(f"biomedlm_jax.kernels.{backend}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(kernel: _Kernel, qkv: Array, scale: Array, bounds: Documents | None) -> Array:
    return _forward(kernel, qkv, scale, bounds)[0]


def _on_rows(kernel: _Kernel, function: Any, *arguments: Any) -> Any:
    """Runs `function` on each device's rows of all arguments but the second, the scale.

    A Pallas call is opaque to the partitioner, which would otherwise gather all rows on every device.
    """
    if kernel.rows is None:
        return function(*arguments)
    specs = tuple(P() if i == 1 else kernel.rows for i in range(len(arguments)))
    return jax.shard_map(function, in_specs=specs, out_specs=kernel.rows, check_vma=False)(*arguments)


def _forward(kernel: _Kernel, qkv: Array, scale: Array, bounds: Documents | None) -> tuple[Array, Any]:
    def run(qkv: Array, scale: Array, bounds: Documents | None) -> Any:
        out, lse = _module(kernel.backend).forward(qkv, scale, bounds, kernel.blocks, kernel.interpret)
        return out, lse

    out, lse = checkpoint_name(_on_rows(kernel, run, qkv, scale, bounds), CHECKPOINT_NAME)
    return out, (qkv, scale, bounds, out, lse)


def _backward(kernel: _Kernel, residuals: Any, d_out: Array) -> tuple[Array, Array, None]:
    qkv, scale, bounds, out, lse = residuals

    def run(qkv: Array, scale: Array, bounds: Documents | None, out: Array, lse: Any, d_out: Array) -> Array:
        backward = _module(kernel.backend).backward
        return backward(qkv, scale, bounds, out, lse, d_out, kernel.blocks, kernel.interpret)

    d_qkv = _on_rows(kernel, run, qkv, scale, bounds, out, lse, d_out)
    # Scores are scale * q . k, so scale * d(scale) = sum(q * dq). The compiler drops it where nobody asks.
    heads = qkv.shape[2] // 3
    q, d_q = qkv[:, :, :heads].astype(jnp.float32), d_qkv[:, :, :heads].astype(jnp.float32)
    return d_qkv, jnp.sum(q * d_q) / scale, None


_attention.defvjp(_forward, _backward)
