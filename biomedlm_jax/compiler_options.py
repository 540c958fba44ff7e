"""Options of XLA's compilers that the step on several devices is compiled with, each for a reason.

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
from jax.sharding import Mesh, SingleDeviceSharding

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Option:
    """A setting of a compiler, with the names and values that it has had, the newest first."""

    spellings: tuple[tuple[str, Any], ...]
    devices: str
    """What `device_kind` must match."""
    reason: str


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


def for_mesh(mesh: Mesh) -> dict[str, Any]:
    """The options to compile a step for these devices with; none for one device, which exchanges nothing."""
    # One of this process's own, which compiles the trials; all are of one kind.
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    return dict(_for_device(device, os.environ.get(_VARIABLES.get(device.platform, ""), ""))) if mesh.size > 1 else {}


_VARIABLES = {"gpu": "XLA_FLAGS", "cuda": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}


@functools.cache
def _for_device(device: Any, set_by_user: str) -> tuple[tuple[str, Any], ...]:
    theirs = set(re.findall(r"--(\w+)", set_by_user))
    nothing = jax.jit(lambda: 0, out_shardings=SingleDeviceSharding(device)).lower()
    nothing.compile()  # so that what fails with an option fails for the option
    chosen = []
    for option in OPTIONS:
        names = {name for name, _ in option.spellings}
        if not re.search(option.devices, device.device_kind) or names & theirs:
            continue
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
