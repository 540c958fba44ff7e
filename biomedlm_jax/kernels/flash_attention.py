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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from biomedlm_jax.devices import Device, current_device
from biomedlm_jax.errors import UserError
from biomedlm_jax.kernels import block_sizes
from biomedlm_jax.kernels.documents import Documents, documents

Backend = Literal["triton", "mosaic_gpu", "mosaic_tpu"]

# The platform of each, in order of preference.
BACKENDS: dict[Backend, str] = {"mosaic_gpu": "gpu", "triton": "gpu", "mosaic_tpu": "tpu"}

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

    The backward pass is deterministic. It also gives the gradient of `scale` (nan where that is 0). There are no second
    derivatives, and the kernel for Hopper does not work under `jax.vmap`.

    Args:
      qkv: queries, keys and values of all heads, in this order along the third axis.
      scale: factor of the scores, not negative, applied to them in float32; may be traced (it differs by layer under a
        scan), and one that turns out negative then gives nan on Hopper.
      segment_ids: documents packed in a row, as runs of equal ids, which do not attend to each other.
      backend: a kernel's name; by default the best that serves the device and the array.
      blocks: the backend's `Blocks`; by default as tuned for the device and the shape.
      rows: how the batch axis lies on the mesh of `Auto` axes set by `jax.set_mesh`; each device then runs the kernel
        on its rows.
      interpret: runs the kernel in Pallas's interpreter: true, or the interpreter's parameters.

    Raises:
      UserError: no kernel, or not the one asked for, takes these arguments; says which limit was passed.
    """
    scale = _check_scale(scale)
    if segment_ids is not None:
        _check_segment_ids(segment_ids, qkv)
    device = current_device()
    backend = choose_backend(qkv, device, backend, bool(interpret))
    if blocks is not None and not isinstance(blocks, _module(backend).Blocks):
        raise UserError(f"flash attention: blocks of the {backend} kernel are {backend}.Blocks, not {blocks}")
    if blocks is None:
        blocks = block_sizes.lookup(backend, device.kind, qkv.shape, qkv.dtype)
    bounds = None if segment_ids is None else documents(segment_ids)
    return _attention(_Kernel(backend, blocks, rows, interpret), qkv, scale, bounds)


def choose_backend(qkv: Any, device: Device, backend: Backend | None = None, interpreted: bool = False) -> Backend:
    """The kernel that takes `qkv`, an array or its shape and type, on the device: `backend` itself, if it is given.

    Raises:
      UserError: there is none; says which limits were passed.
    """
    _check_shape(qkv)
    if backend is not None and backend not in BACKENDS:
        raise UserError(f"flash attention: the kernels are {', '.join(BACKENDS)}, not {backend}")
    there = [name for name, platform in BACKENDS.items() if interpreted or platform == device.platform]
    limits = []
    for name in there if backend is None else [backend]:
        module = _module(name)
        unserved = "" if interpreted else module.device_limit(device)
        limit = unserved or module.limit(qkv)
        if not limit:
            return name
        # What a kernel for another kind of device would say of the array does not matter.
        if backend is not None or not unserved:
            limits.append(f"the {name} kernel {limit}")
    if not limits:
        raise UserError(
            "flash attention runs on NVIDIA GPUs from Ampere (compute capability 8.0) on and on TPUs from v4 on, and "
            f"this is {device.kind}"
        )
    raise UserError(f"flash attention: {'; '.join(limits)}")


def _check_shape(qkv: Any) -> None:
    if qkv.ndim != 4 or qkv.shape[2] % 3 or 0 in qkv.shape:
        raise UserError(
            f"flash attention: qkv must be [batch, seq, 3 * heads, head_dim], none of them 0, not {list(qkv.shape)}"
        )
    if qkv.shape[1] > MAX_SEQ:
        raise UserError(f"flash attention takes up to {MAX_SEQ} positions a row, not {qkv.shape[1]}")


def _check_scale(scale: Any) -> Float[Array, ""]:
    mistake = UserError(f"flash attention: scale must be one finite number that is not negative, not {scale}")
    if isinstance(scale, jax.core.Tracer):
        if scale.shape or not jnp.issubdtype(scale.dtype, jnp.number) or jnp.iscomplexobj(scale):
            raise mistake
        return scale.astype(jnp.float32)
    try:
        # Finite as the kernels have it: 1e39 is infinite in float32.
        with np.errstate(over="ignore"):
            value = np.float32(scale)
    except (TypeError, ValueError, OverflowError) as error:
        raise mistake from error
    if value.shape or isinstance(scale, (bool, str)) or not (np.isfinite(value) and value >= 0):
        raise mistake
    return jnp.asarray(value)


def _check_segment_ids(segment_ids: Any, qkv: Any) -> None:
    shape, dtype = jnp.shape(segment_ids), jnp.result_type(segment_ids)
    if shape != qkv.shape[:2] or not jnp.issubdtype(dtype, jnp.integer):
        raise UserError(
            f"flash attention: segment_ids must be integers of shape {list(qkv.shape[:2])}, not {dtype} of shape "
            f"{list(shape)}"
        )


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

    results = _on_rows(kernel, run, qkv, scale, bounds)
    # A scan stacks what is saved. Without the barrier, jax 0.11's XLA makes a second call of a Mosaic GPU kernel whose
    # results it writes into the stack, beside the one whose results are used.
    out, lse = checkpoint_name(jax.lax.optimization_barrier(results), CHECKPOINT_NAME)
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
