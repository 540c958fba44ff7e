"""The device that a program is traced for: the one in this machine, or one that it is compiled for from afar."""

from typing import NamedTuple

import jax

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
