"""Options of XLA's compilers that the step is compiled with, each for a reason.

They are given to `jax.jit(compiler_options=...)`, not to the environment, so that they apply to the step alone and may
differ by device. What the user sets in XLA_FLAGS or LIBTPU_INIT_ARGS wins. Options come and go between releases: one
that the installed compiler does not know is left out, with a warning. tests/test_compile.py looks at what they do.
"""

import dataclasses
import functools
import logging
import os
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Option:
    """A setting of a compiler, with the names and values that it has had, the newest first."""

    spellings: tuple[tuple[str, Any], ...]
    devices: str
    """What `device_kind` must match."""
    reason: str
    exchanges: bool = True
    """Whether it is about exchanges between devices, of which one device has none."""


OPTIONS = (
    Option(
        (("xla_gpu_enable_latency_hiding_scheduler", True),),
        "NVIDIA",
        "starts each exchange early and ends it late, with products between: without it, gathers wait in line",
    ),
    Option(
        (
            ("xla_gpu_pipeline_all_gather", "COLLECTIVE_PIPELINING_MODE_ON"),
            ("xla_gpu_enable_pipelined_all_gather", True),
        ),
        "NVIDIA",
        "gathers a layer's weights while the layer before it is computed; else each layer waits for its first ones",
    ),
    Option(
        (("xla_gpu_experimental_parallel_collective_overlap_limit", 4),),
        "NVIDIA",
        "a layer has four matrices: all may be on their way at once, so that none waits for another one's product",
    ),
    Option(
        (("xla_allow_excess_precision", False),),
        "",
        "rounds to bfloat16 where the step says so: else a small bias decides all ties of its sum with a product and "
        "shifts the loss by a thousandth, and GELU's gradient is also written in float32",
        exchanges=False,
    ),
    Option(
        (("xla_gpu_enable_triton_gemm", False),),
        "NVIDIA",
        "leaves products to cuBLASLt, which adds biases as it writes; on an H200 Triton's was faster for 32 of 481",
        exchanges=False,
    ),
    Option(
        (("xla_tpu_enable_sparse_core_collective_offload_all_gather", True),),
        "TPU v5$|TPU v5p|TPU v6",
        "the SparseCores gather while the TensorCores multiply",
    ),
    Option(
        (("xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", True),),
        "TPU v5$|TPU v5p|TPU v6",
        "the SparseCores reduce gradients while the TensorCores multiply",
    ),
)


# Where users set options of the compiler for a platform.
_VARIABLES = {"gpu": "XLA_FLAGS", "cuda": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}


def for_mesh(mesh: Mesh) -> dict[str, Any]:
    """The options to compile a step for these devices with."""
    return dict(_for_mesh(mesh, os.environ.get(_VARIABLES.get(mesh.devices.flat[0].platform, "XLA_FLAGS"), "")))


@functools.cache
def _for_mesh(mesh: Mesh, set_by_user: str) -> tuple[tuple[str, Any], ...]:
    theirs = set(re.findall(r"--(\w+)", set_by_user))
    kind = mesh.devices.flat[0].device_kind
    wanted = [
        option
        for option in OPTIONS
        if re.search(option.devices, kind)
        and (mesh.size > 1 or not option.exchanges)
        and not theirs & {name for name, _ in option.spellings}
    ]
    if not wanted:
        return ()
    # On the whole mesh, which is the one that a caller may have set.
    nothing = jax.jit(lambda: 0, out_shardings=NamedSharding(mesh, P())).lower()
    nothing.compile()  # so that what fails with an option fails for the option
    chosen = []
    for option in wanted:
        known = next((spelling for spelling in option.spellings if _is_known(nothing, *spelling)), None)
        if known:
            chosen.append(known)
        else:
            logger.warning("this compiler has no option %s; left out: it %s", option.spellings[0][0], option.reason)
    return tuple(chosen)


def _is_known(nothing: Any, name: str, value: Any) -> bool:
    """Whether the compiler takes an option: it must compile a lowered program that does nothing."""
    try:
        nothing.compile({name: value})
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        return False
    return True
