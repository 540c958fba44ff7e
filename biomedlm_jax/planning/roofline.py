"""How long a step takes by what its devices can compute, stream through memory, and exchange at the most."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from biomedlm_jax.hlo import Collective
from biomedlm_jax.planning.flops import PHASES, Phase, Product, phase_of
from biomedlm_jax.planning.traffic import Access

Link = Callable[[Collective], tuple[float, str]]
"""Bytes a second that each device can send in a collective, and the name of the link."""


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """How much of what the data sheets promise is reached, and what energy and money come from."""

    product_fraction: float
    """Of the peak FLOP/s, in matrix products."""
    attention_fraction: float
    """Of the peak FLOP/s, in attention kernels, counting causal work only."""
    hbm_fraction: float
    """Of the memory's bandwidth, in operations that are no products."""
    link_fraction: float
    """Of the links' bandwidth, within hosts, between hosts, or ICI."""
    latency: float
    """Seconds of each collective, whatever its size."""
    memory_fraction: float
    """Of a device's memory that the program gets; the rest is for the runtime, its libraries and fragmentation."""
    calibration: str
    """Where the fractions come from."""
    pue: float = 1.2
    """Energy of the building over that of its devices: 1.2 in Luccioni et al. 2022, arXiv:2211.02001 (BLOOM)."""
    grid: float = 0.373
    """kg of CO2 a kWh: the mean of the United States' grid in 2022, EPA eGRID."""


_MEASURED = "mosaicml/llm-foundry, scripts/train/benchmarking: GPT 3b on {}, MFU {} at 1,024 tokens on 8 GPUs"

# By the beginning of a chip's name. Calibrated so that `python benchmarks/predicted.py --calibrate` comes out at the
# published utilization of the same architecture; see docs/scaling.md.
_ASSUMPTIONS = {
    "a100": Assumptions(
        product_fraction=0.78,
        attention_fraction=0.42,
        hbm_fraction=0.8,
        link_fraction=0.8,
        latency=30e-6,
        memory_fraction=0.9,  # as `train` has it
        calibration=_MEASURED.format("A100-40GB and A100-80GB", "58 and 63 %"),
    ),
    "h": Assumptions(
        product_fraction=0.64,
        attention_fraction=0.38,
        hbm_fraction=0.8,
        link_fraction=0.8,
        latency=30e-6,
        memory_fraction=0.9,  # as `train` has it
        calibration=_MEASURED.format("H100", "46 %") + " (late 2023; software has become faster since)",
    ),
    "tpu": Assumptions(
        product_fraction=0.8,
        attention_fraction=0.4,
        hbm_fraction=0.8,
        link_fraction=0.8,
        latency=10e-6,
        memory_fraction=1.0,
        calibration="none of this size is published for TPUs; guesses near what MaxText reaches with larger models "
        "(its README: 68 to 70 % MFU at 32B and more on v5p, 61 to 67 % at 16B and 32B on v5e)",
    ),
}


def assumptions(chip_name: str) -> Assumptions:
    """Those for a chip of `targets.CHIPS`."""
    return next(value for prefix, value in _ASSUMPTIONS.items() if chip_name.startswith(prefix))


EXCHANGE_KINDS = ("gather", "reduce", "other")


def _kind(collective: Collective) -> str:
    return {"all-gather": "gather", "reduce-scatter": "reduce", "all-reduce": "reduce"}.get(collective.kind, "other")


@dataclasses.dataclass(frozen=True)
class PhaseTime:
    """Seconds of one part of a step on a device, by what they go to."""

    products: float
    memory: float
    """Operations that are no products."""
    hidden: float
    """Exchange while something is computed."""
    exposed: float
    """Exchange while nothing is."""
    kinds: dict[str, tuple[float, float]]
    """Of `EXCHANGE_KINDS`, what is hidden and what is exposed."""

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.products + self.memory + self.exposed


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A step's time, part by part."""

    phases: dict[Phase, PhaseTime]

    def total(self, part: str) -> float:
        """Seconds of one field of `PhaseTime` over all phases."""
        return sum(getattr(phase, part) for phase in self.phases.values())

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.total("seconds")

    @property
    def limit(self) -> str:
        """What the step would still take longest for if all else took no time: products, memory or network."""
        network = self.total("hidden") + self.total("exposed")
        limits = {"products": self.total("products"), "memory": self.total("memory"), "network": network}
        return max(limits, key=lambda name: limits[name])


def collective_seconds(collective: Collective, link: Link, assumed: Assumptions) -> float:
    """Of one execution."""
    return collective.wire_bytes / (link(collective)[0] * assumed.link_fraction) + assumed.latency


def step_time(
    chip: Any,
    assumed: Assumptions,
    products: Iterable[Product],
    accesses: Iterable[Access],
    collectives: Iterable[Collective],
    link: Link,
) -> StepTime:
    """The time of a step on one of the devices that take it together.

    A product takes what it needs for its FLOPs or for its operands, whichever is longer. Products, other operations
    and exchanges that the compiler did not schedule beside anything follow one another. Exchanges that it did are
    hidden as far as the same part of the step, forward or backward, computes for that long.
    """
    compute = dict.fromkeys(PHASES, 0.0)
    memory = dict.fromkeys(PHASES, 0.0)
    beside = {phase: dict.fromkeys(EXCHANGE_KINDS, 0.0) for phase in PHASES}
    alone = {phase: dict.fromkeys(EXCHANGE_KINDS, 0.0) for phase in PHASES}
    bandwidth = chip.hbm_bandwidth * assumed.hbm_fraction
    for product in products:
        fraction = assumed.attention_fraction if product.attention else assumed.product_fraction
        seconds = max(product.flops / (chip.peak_flops * fraction), product.bytes / bandwidth)
        compute[product.phase] += seconds * product.executions
    for access in accesses:
        memory[access.phase] += access.bytes * access.executions / bandwidth
    for collective in collectives:
        seconds = collective_seconds(collective, link, assumed) * collective.executions
        place = beside if collective.asynchronous else alone
        place[phase_of(collective.op_name)][_kind(collective)] += seconds
    phases = {}
    for phase in PHASES:
        asynchronous = sum(beside[phase].values())
        hidden = min(asynchronous, compute[phase] + memory[phase])
        fraction = hidden / asynchronous if asynchronous else 1.0
        kinds = {
            kind: (beside[phase][kind] * fraction, beside[phase][kind] * (1 - fraction) + alone[phase][kind])
            for kind in EXCHANGE_KINDS
        }
        exposed = sum(alone[phase].values()) + asynchronous - hidden
        phases[phase] = PhaseTime(compute[phase], memory[phase], hidden, exposed, kinds)
    return StepTime(phases)
