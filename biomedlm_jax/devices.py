"""The device that a program is traced for: the one in this machine, or one that it is compiled for from afar.

And where JAX keeps what it compiles for the devices of this machine.
"""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax

logger = logging.getLogger(__name__)

# Compute capabilities of devices that this machine need not have, by what their names begin with.
_CAPABILITIES = {"NVIDIA V100": 7.0, "NVIDIA A100": 8.0, "NVIDIA H100": 9.0, "NVIDIA H200": 9.0, "NVIDIA B200": 10.0}


class Device(NamedTuple):
    """What chooses an implementation."""

    platform: str
    """cpu, gpu or tpu."""
    kind: str
    """The vendor's name, such as 'NVIDIA H200' or 'TPU v5 lite'."""
    capability: float
    """CUDA compute capability; 0 elsewhere, and where it is not known."""
    cores: int
    """Multiprocessors of a GPU; 0 where it is not known."""


def current_device() -> Device:
    """The device of the mesh set by `jax.set_mesh`, and without one this machine's first device."""
    local = jax.devices()[0]
    absent = jax.sharding.get_abstract_mesh().abstract_device
    if absent is None or (absent.platform, absent.device_kind) == (local.platform, local.device_kind):
        capability = float(getattr(local, "compute_capability", 0))
        return Device(local.platform, local.device_kind, capability, getattr(local, "core_count", 0))
    capabilities = (c for name, c in _CAPABILITIES.items() if absent.device_kind.startswith(name))
    return Device(absent.platform, absent.device_kind, next(capabilities, 0.0), absent.num_cores or 0)


def keep_compiled_programs(job: Any) -> None:
    """Makes JAX keep compiled programs on disk for later processes; call it before anything is compiled.

    On GPUs and TPUs they lie in `$XDG_CACHE_HOME/biomedlm_jax/compiled` unless JAX's own settings say where, or that
    none are kept. JAX has XLA keep in the same folder which GPU kernels were found to be the fastest
    (`jax_persistent_cache_enable_xla_caches`). A folder that cannot be written to costs a warning.

    Args:
      job: of `distributed.join`. Only process 0 writes, and all must see the folder: GPUs' compilers share their work,
        and those that compile would wait for one that has found its program.
    """
    made = job.first("make the folder of compiled programs", _make_folder)
    is_shared = job.all("sees the folder of compiled programs", bool(made) and Path(made).exists())
    if not made:
        return
    if job.index == 0:
        Path(made).unlink()
        if not is_shared:
            logger.warning(
                "compiled programs are not kept: not all processes see %s; JAX_COMPILATION_CACHE_DIR names another "
                "folder",
                Path(made).parent,
            )
    jax.config.update("jax_compilation_cache_dir", str(Path(made).parent) if is_shared else None)


def _make_folder() -> str:
    """The path of a new file in the folder where programs shall be kept; empty to leave it to JAX."""
    asked = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    # Programs for a CPU are for that very one, and a home folder may be shared by hosts with others.
    if (
        not jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
        or "://" in (asked or "")
        or (not asked and jax.default_backend() == "cpu")
    ):
        return ""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(asked or home, *(() if asked else ("biomedlm_jax", "compiled"))).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=folder)
    except OSError as error:
        logger.warning(
            "compiled programs cannot be kept in %s (%s): JAX_COMPILATION_CACHE_DIR says where else",
            folder,
            error.strerror,
        )
        # What is there can still be read, but XLA would fail to compile where it cannot write.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        return ""
    os.close(handle)
    return path
