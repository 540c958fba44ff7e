"""Devices that programs are planned and compiled for without having them: what they are, and how many.

XLA's GPU compiler, Triton and Mosaic GPU are in jax's CUDA plugin, ptxas in wheels of NVIDIA's, XLA's TPU compiler and
Mosaic TPU in libtpu's. All of them run on a machine with neither GPU nor TPU: `pip install -e '.[plan]'`.
"""

import dataclasses
import difflib
import importlib.util
import itertools
import math
import os
import re
from pathlib import Path
from typing import Any

from biomedlm_jax.errors import UserError

GB, MiB, GiB = 10**9, 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as its maker describes it. Bandwidths are bytes a second in one direction."""

    name: str
    platform: str
    """gpu or tpu."""
    kind: str
    """Its `device_kind` in jax."""
    memory: int
    """Bytes of its HBM that are there for programs, by what its tools or its compiler say."""
    hbm_bandwidth: float
    peak_flops: float
    """Dense bfloat16 FLOP/s."""
    link_bandwidth: float
    """GPU: to all others of its host together (NVLink). TPU: over one of its links to a neighbour (ICI)."""
    network_bandwidth: float
    """GPU: its share of its host's network. TPU: 0, a slice needs none."""
    power: float | None
    """Watts; None where none is published."""
    source: str
    max_per_host: int = 0
    """Of GPUs: the most that any host has."""
    xla: dict[str, Any] | None = None
    """What XLA's GPU compiler asks of a device."""


_AMPERE = {
    "major": 8,
    "cores": 108,
    "fpus": 64,
    "clock": 1.41,
    "shared": 166_912,
    "shared_core": 167_936,
    "l2": 40 << 20,
}
_HOPPER = {
    "major": 9,
    "cores": 132,
    "fpus": 128,
    "clock": 1.98,
    "shared": 232_448,
    "shared_core": 233_472,
    "l2": 50 << 20,
}
_A100_SOURCE = "NVIDIA A100 data sheet; memory: nvidia-smi; network: 8 x 200 Gb/s a host (DGX A100)"
_H100_SOURCE = "NVIDIA H100 SXM and H200 data sheets; memory: nvidia-smi; network: 8 x 400 Gb/s a host (DGX)"
_TPU_SOURCE = (
    "Google Cloud's page of the TPU; memory: what libtpu's compiler says is available; a link: the page's bandwidth of "
    "a chip over its links"
)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="a100-40gb",
            platform="gpu",
            kind="NVIDIA A100-SXM4-40GB",
            memory=40_960 * MiB,
            hbm_bandwidth=1_555 * GB,
            peak_flops=312e12,
            link_bandwidth=300 * GB,
            network_bandwidth=25 * GB,
            power=400,
            source=_A100_SOURCE,
            xla=_AMPERE | {"memory": 42 * GB},
            max_per_host=16,
        ),
        Chip(
            name="a100-80gb",
            platform="gpu",
            kind="NVIDIA A100-SXM4-80GB",
            memory=81_920 * MiB,
            hbm_bandwidth=2_039 * GB,
            peak_flops=312e12,
            link_bandwidth=300 * GB,
            network_bandwidth=25 * GB,
            power=400,
            source=_A100_SOURCE,
            xla=_AMPERE | {"memory": 84 * GB},
            max_per_host=8,
        ),
        Chip(
            name="h100",
            platform="gpu",
            kind="NVIDIA H100 80GB HBM3",
            memory=81_559 * MiB,
            hbm_bandwidth=3_350 * GB,
            peak_flops=989e12,
            link_bandwidth=450 * GB,
            network_bandwidth=50 * GB,
            power=700,
            source=_H100_SOURCE,
            xla=_HOPPER | {"memory": 84 * GB},
            max_per_host=8,
        ),
        Chip(
            name="h200",
            platform="gpu",
            kind="NVIDIA H200",
            memory=143_771 * MiB,
            hbm_bandwidth=4_800 * GB,
            peak_flops=989e12,
            link_bandwidth=450 * GB,
            network_bandwidth=50 * GB,
            power=700,
            source=_H100_SOURCE,
            xla=_HOPPER | {"memory": 150 * GB},
            max_per_host=8,
        ),
        Chip(
            name="tpu-v4",
            platform="tpu",
            kind="TPU v4",
            memory=int(30.75 * GiB),
            hbm_bandwidth=1_228 * GB,
            peak_flops=275e12,
            link_bandwidth=50 * GB,
            network_bandwidth=0,
            power=170,
            source=_TPU_SOURCE + "; power: mean of Jouppi et al. 2023, arXiv:2304.01433",
        ),
        Chip(
            name="tpu-v5e",
            platform="tpu",
            kind="TPU v5 lite",
            memory=int(15.75 * GiB),
            hbm_bandwidth=819 * GB,
            peak_flops=197e12,
            link_bandwidth=50 * GB,
            network_bandwidth=0,
            power=None,
            source=_TPU_SOURCE,
        ),
        Chip(
            name="tpu-v5p",
            platform="tpu",
            kind="TPU v5",
            memory=int(95.73 * GiB),
            hbm_bandwidth=2_765 * GB,
            peak_flops=459e12,
            link_bandwidth=100 * GB,
            network_bandwidth=0,
            power=None,
            source=_TPU_SOURCE,
        ),
        Chip(
            name="tpu-v6e",
            platform="tpu",
            kind="TPU v6 lite",
            memory=int(31.24 * GiB),
            hbm_bandwidth=1_640 * GB,
            peak_flops=918e12,
            link_bandwidth=100 * GB,
            network_bandwidth=0,
            power=None,
            source=_TPU_SOURCE,
        ),
    )
}

# Slices that can be rented: of two dimensions all, of three those of less than a cube of 64 chips; larger ones are
# made of such cubes.
_FLAT_SLICES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_SLICES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LARGEST_SLICE = {"tpu-v4": 4_096, "tpu-v5p": 6_144}
_LARGEST_POD = 16_384


def peak_flops(device_kind: str) -> float | None:
    """Data-sheet dense bfloat16 FLOP/s of a device by jax's name of it; None where it is not known (a CPU)."""
    chip = chip_of(device_kind)
    return chip.peak_flops if chip else None


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls so; of a GPU another form of the same model will do (A100-PCIE, H100 NVL)."""
    exact = (chip for chip in CHIPS.values() if chip.kind == device_kind)
    model = re.search(r"\b[AH]\d00\b", device_kind)
    same_model = (chip for chip in CHIPS.values() if model and model[0] in chip.kind)
    return next(itertools.chain(exact, same_model), None)


@dataclasses.dataclass(frozen=True)
class Target:
    """So many devices of one kind, and how they lie."""

    chip: Chip
    dims: tuple[int, ...]
    """GPUs: hosts, GPUs a host. TPUs: the slice's topology."""

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.dims))}"

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.dims)

    def devices(self) -> list[Any]:
        """The devices, which programs can be compiled for and which cannot run any.

        Raises:
          UserError: a package with their compiler is missing.
        """
        reason = missing(self.chip.name)
        if reason:
            raise UserError(f"compiling for {self.chip.name} {reason}: pip install -e '.[plan]'")
        keep_off_devices()
        from jax.experimental import topologies

        topology = "x".join(map(str, self.dims))
        if self.chip.platform == "tpu":
            name = f"{self.chip.name.removeprefix('tpu-')}:{topology}"
            # As TPU VMs have them: both cores of a v4 are one device.
            options = {"chip_config_name": "megacore"} if self.chip.name == "tpu-v4" else {}
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
        assert self.chip.xla
        target_config = _XLA_GPU.format(kind=self.chip.kind, bandwidth=int(self.chip.hbm_bandwidth), **self.chip.xla)
        description = topologies.get_topology_desc(
            platform="cuda", target_config=target_config, topology=f"1x{topology}"
        )
        return list(description.devices)

    def bandwidth(self, group: list[Any]) -> tuple[float, str]:
        """Bytes a second that each device of a group can send at the most when all groups like it exchange at once.

        GPUs: over NVLink within a host; between hosts, rings pass through the shares of the host's network of all its
        members. TPUs: over their links along the slice's axes that the group spans, both ways where an axis is a ring.

        Returns:
          It, and the link it goes over: 'within hosts', 'between hosts' or 'ICI'.
        """
        chip = self.chip
        if chip.platform == "tpu":
            lines = 0
            for axis, size in enumerate(self.dims):
                spanned = len({device.coords[axis] for device in group})
                if spanned > 1:
                    lines += 2 if spanned == size and self._wraps(size) else 1
            return chip.link_bandwidth * max(lines, 1), "ICI"
        hosts: dict[int, int] = {}
        for device in group:
            hosts[device.process_index] = hosts.get(device.process_index, 0) + 1
        if len(hosts) == 1:
            return chip.link_bandwidth, "within hosts"
        return min(chip.link_bandwidth, min(hosts.values()) * chip.network_bandwidth), "between hosts"

    def _wraps(self, size: int) -> bool:
        """Whether an axis of this length is closed to a ring: in slices of whole cubes, and of whole v5e, v6e pods."""
        return size % 4 == 0 and size >= 4 if len(self.dims) == 3 else size == 16


def parse(text: str) -> Target:
    """The target that `a100-40gb:16x8` (hosts x GPUs a host) or `tpu-v5p:4x4x8` (a slice's topology) names.

    Raises:
      UserError: there is no such device or topology; names the nearest, and all.
    """
    name, _, topology = text.partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        near = [chip for chip in CHIPS if name and name.lower() in chip] or difflib.get_close_matches(
            name.lower(), CHIPS, n=1, cutoff=0.4
        )
        meant = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f"no target is called {name!r}{meant} There are {', '.join(CHIPS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", topology):
        form = "HOSTSxGPUS, as in 16x8" if chip.platform == "gpu" else "a topology, as in " + _example(chip)
        raise UserError(f"{text!r}: after {name}: comes {form}")
    dims = tuple(map(int, topology.split("x")))
    _check_topology(chip, dims, text)
    return Target(chip, dims)


def _example(chip: Chip) -> str:
    return "4x4x8" if chip.name in _LARGEST_SLICE else "16x16"


def _check_topology(chip: Chip, dims: tuple[int, ...], text: str) -> None:
    if chip.platform == "gpu":
        if len(dims) != 2:
            raise UserError(f"{text}: GPUs are given as HOSTSxGPUS, as in {chip.name}:16x8")
        if dims[1] > chip.max_per_host:
            raise UserError(f"{text}: a host has at most {chip.max_per_host} {chip.name}, not {dims[1]}")
        if math.prod(dims) > _LARGEST_POD:
            raise UserError(f"{text}: {math.prod(dims):,} GPUs are more than can be planned for ({_LARGEST_POD:,})")
    elif chip.name not in _LARGEST_SLICE:
        if dims not in _FLAT_SLICES:
            slices = ", ".join("x".join(map(str, s)) for s in _FLAT_SLICES)
            raise UserError(f"{text}: there is no such slice of {chip.name}; there are {slices}")
    elif len(dims) != 3 or (dims not in _SMALL_SLICES and any(dim % 4 for dim in dims)):
        slices = ", ".join("x".join(map(str, s)) for s in _SMALL_SLICES)
        raise UserError(
            f"{text}: there is no such slice of {chip.name}; there are {slices}, and AxBxC of multiples of 4"
        )
    elif math.prod(dims) > _LARGEST_SLICE[chip.name]:
        raise UserError(
            f"{text}: {math.prod(dims):,} chips; the largest slice of {chip.name} has {_LARGEST_SLICE[chip.name]:,}"
        )


def missing(name: str) -> str:
    """What has to be installed to compile for a chip; empty if all is there."""
    if CHIPS[name].platform == "tpu":
        return "" if importlib.util.find_spec("libtpu") else "needs the wheel libtpu"
    if not importlib.util.find_spec("jax_plugins") or not importlib.util.find_spec("jax_plugins.xla_cuda13"):
        return "needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt"
    return "" if cuda_tool("ptxas").is_file() else "needs the wheels nvidia-cuda-nvcc, nvidia-nvvm and nvidia-cuda-crt"


def cuda_tool(name: str) -> Path:
    """Where one of the programs in NVIDIA's wheels is; an empty path if it is not installed."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = nvidia.submodule_search_locations if nvidia else None
    return next((Path(f) / "cu13/bin" / name for f in folders or () if (Path(f) / "cu13/bin" / name).is_file()), Path())


def keep_off_devices() -> None:
    """Keeps jax off the devices of this machine, and libtpu from looking for some; before jax first looks for any."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # libtpu: look for no TPU host,
        "TPU_WORKER_HOSTNAMES": "localhost",  # and do not complain that there is none;
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # share the compiler with other processes
        "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA: only errors
    }.items():
        os.environ.setdefault(name, value)
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")


# By the names of XLA's GpuTargetConfigProto. From the data sheets and CUDA's tables of compute capabilities.
_XLA_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {shared}  shared_memory_per_core: {shared_core}
  core_count: {cores}  fpus_per_core: {fpus}  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: {l2}  clock_rate_ghz: {clock}  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{kind}"
"""
