"""How fast the devices of a mesh exchange data, measured before a run: a slow link shows here, not after a day."""

import functools
import logging
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from biomedlm_jax.sharding import Exchange, find_rings

logger = logging.getLogger(__name__)

_MIB = 1 << 20
_SIZES = (1 * _MIB, 16 * _MIB, 128 * _MIB)
_REPEATS = 3
_BUDGET = 1.5  # seconds


class _Kind(NamedTuple):
    axis: str
    """Mesh axis it runs over."""
    passes: int
    """How often each device sends the array, but for its own part: nccl-tests' "bus bandwidth" counts so, too."""
    operation: Callable[[Exchange, Array], Array]
    """As a step does it."""
    before: P
    after: P


_KINDS = {
    "all-gather": _Kind("fsdp", 1, Exchange.all_gather, P("fsdp"), P()),
    "reduce-scatter": _Kind("fsdp", 1, Exchange.reduce_scatter, P(), P("fsdp")),
    "all-reduce": _Kind("replica", 2, lambda _, part: jax.lax.psum(part, "replica"), P(), P()),
}


def log_bandwidth(mesh: Mesh, first: Callable[[str, Callable[[], bool]], bool]) -> None:
    """Measures the kinds of exchange that a step has, at a few sizes, and logs GB/s that each device sends.

    Args:
      first: `distributed.Job.first`, by which all processes stop at the same size.
    """
    rates: dict[str, list[str]] = {name: [] for name, kind in _KINDS.items() if mesh.shape[kind.axis] > 1}
    spent = 0.0
    for size in _SIZES:
        # What an exchange costs grows with its size; a slow network is known well enough without the large ones.
        expected = spent * size / _SIZES[0]
        if not first(f"say whether {size} bytes take too long", functools.partial(bool, expected < _BUDGET)):
            break
        spent = 0.0
        for name, shown in rates.items():
            axis, passes, *_ = _KINDS[name]
            seconds = _seconds(mesh, _KINDS[name], size)
            sent = passes * size * (mesh.shape[axis] - 1) / mesh.shape[axis]
            shown.append(f"{sent / seconds / 1e9:.2f} at {size // _MIB} MiB")
            spent += seconds * (_REPEATS + 1) * _SIZES[0] / size
    for name, shown in rates.items():
        axis = _KINDS[name].axis
        logger.info(
            "bandwidth: %s over %d devices (%s), GB/s a device: %s", name, mesh.shape[axis], axis, ", ".join(shown)
        )


def _seconds(mesh: Mesh, kind: _Kind, size: int) -> float:
    """The median time of an exchange of float32 numbers, `size` bytes in all."""
    numbers = size // 4 // mesh.size * mesh.size
    array = jax.jit(lambda: jnp.ones(numbers, jnp.float32), out_shardings=NamedSharding(mesh, kind.before))()
    run = jax.jit(
        jax.shard_map(
            functools.partial(kind.operation, Exchange(rings=find_rings(mesh))),
            mesh=mesh,
            in_specs=kind.before,
            out_specs=kind.after,
            check_vma=False,  # what was gathered is the same everywhere, which its type does not say
        )
    )
    jax.block_until_ready(run(array))  # compiles
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(array))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
