"""A plan: what a run on a target takes in memory, time, energy and money. As an object, as text, as JSON."""

import dataclasses
import textwrap
from typing import Any

from biomedlm_jax.finetune_config import FinetuneConfig
from biomedlm_jax.hlo import Collective
from biomedlm_jax.model import flops_per_token
from biomedlm_jax.planning import roofline
from biomedlm_jax.planning.compiled import CompiledStep
from biomedlm_jax.planning.flops import PHASES
from biomedlm_jax.targets import Target

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind over one link, of a step."""

    kind: str
    dtype: str
    link: str
    group_size: int
    count: int
    bytes: float
    """Of the whole arrays, summed over a step."""
    wire_bytes: float
    """What a device sends in a step."""
    overlapped: float
    """Fraction of the bytes whose exchange is scheduled beside something to compute."""
    seconds: float
    """Hidden or not."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is predicted of a run."""

    compiled: CompiledStep
    assumed: roofline.Assumptions
    time: roofline.StepTime
    exchanges: list[Exchange]
    price: float | None
    """Of an hour of one device."""

    @property
    def memory_limit(self) -> int:
        """Bytes of a device's memory that the program gets."""
        return memory_limit(self.compiled.target)

    @property
    def fits(self) -> bool:
        """Whether the step fits into a device's memory."""
        return self.compiled.memory_bytes <= self.memory_limit

    @property
    def tokens_per_step(self) -> int:
        """Over all devices."""
        return self.compiled.run.train.global_batch_size * self.compiled.run.model.n_positions

    @property
    def tokens_per_second(self) -> float:
        """Over all devices."""
        return self.tokens_per_step / self.time.seconds

    @property
    def model_flops(self) -> float:
        """Of a step on all devices, 6 N + 12 L d T a token."""
        return self.tokens_per_step * flops_per_token(self.compiled.run.model)

    @property
    def hardware_flops(self) -> float:
        """Of a step on all devices: what their products take, recomputation included, of attention the causal half."""
        products = self.compiled.products
        return sum(product.flops * product.executions for product in products) * self.compiled.target.size

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the devices could do at their peak in the step's time."""
        target = self.compiled.target
        return self.model_flops / (self.time.seconds * target.chip.peak_flops * target.size)

    @property
    def days(self) -> float:
        """For `train.steps`, without evaluations, checkpoints and failures."""
        return self.compiled.run.train.steps * self.time.seconds / 86_400

    @property
    def device_hours(self) -> float:
        """For `train.steps`."""
        return self.days * 24 * self.compiled.target.size

    @property
    def kwh(self) -> float | None:
        """Energy of the run at the devices' rated power; None where none is published."""
        power = self.compiled.target.chip.power
        return None if power is None else self.device_hours * power / 1000 * self.assumed.pue

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON; bytes, seconds, FLOPs."""
        compiled, model, train = self.compiled, self.compiled.run.model, self.compiled.run.train
        return {
            "target": str(compiled.target),
            "device": compiled.target.chip.kind,
            "devices": compiled.target.size,
            "mesh": compiled.mesh,
            "settings": {
                "remat": model.remat,
                "unroll": model.unroll,
                "loss_chunk": compiled.config.train.loss_chunk,
                "global_batch_size": train.global_batch_size,
                "gradient_accumulation_steps": train.gradient_accumulation_steps,
                "sequences_per_device": sequences_per_device(compiled),
            },
            "memory": {
                "parts": compiled.memory,
                "total": compiled.memory_bytes,
                "limit": self.memory_limit,
                "capacity": compiled.target.chip.memory,
                "fits": self.fits,
            },
            "exchanges": [dataclasses.asdict(exchange) for exchange in self.exchanges],
            "flops": {"model": self.model_flops, "hardware": self.hardware_flops},
            "time": {
                "step": self.time.seconds,
                "limit": self.time.limit,
                "phases": {name: dataclasses.asdict(phase) for name, phase in self.time.phases.items()},
            },
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "steps": train.steps,
            "days": self.days,
            "device_hours": self.device_hours,
            "kwh": self.kwh,
            "co2_kg": None if self.kwh is None else self.kwh * self.assumed.grid,
            "cost": None if self.price is None else self.device_hours * self.price,
            "assumptions": dataclasses.asdict(self.assumed),
            "device_source": compiled.target.chip.source,
            "unknown": list(compiled.unknown),
        }


def memory_limit(target: Target) -> int:
    """Bytes of a device's memory that a program gets."""
    return int(target.chip.memory * roofline.assumptions(target.chip.name).memory_fraction)


def sequences_per_device(compiled: CompiledStep) -> int:
    """Rows that a device computes at once."""
    train = compiled.run.train
    return train.global_batch_size // train.gradient_accumulation_steps // compiled.target.size


def make_plan(compiled: CompiledStep, price: float | None = None) -> Plan:
    """The plan of a run with a compiled step; `price` is of an hour of one device."""
    assumed = roofline.assumptions(compiled.target.chip.name)

    def link(collective: Collective) -> tuple[float, str]:
        group = [compiled.devices[place] for place in max(collective.groups, key=len)]
        return compiled.target.bandwidth(group)

    time = roofline.step_time(
        compiled.target.chip, assumed, compiled.products, compiled.accesses, compiled.collectives, link
    )
    return Plan(compiled, assumed, time, _exchanges(compiled.collectives, link, assumed), price)


def _exchanges(collectives: list[Collective], link: roofline.Link, assumed: roofline.Assumptions) -> list[Exchange]:
    groups: dict[tuple[str, str, str, int], list[Collective]] = {}
    for collective in collectives:
        if collective.group_size > 1:
            key = (collective.kind, collective.dtype, link(collective)[1], collective.group_size)
            groups.setdefault(key, []).append(collective)
    found = []
    for (kind, dtype, name, size), members in groups.items():
        total = sum(member.bytes * member.executions for member in members)
        beside = sum(member.bytes * member.executions for member in members if member.asynchronous)
        found.append(
            Exchange(
                kind,
                dtype,
                name,
                size,
                count=sum(member.executions for member in members),
                bytes=total,
                wire_bytes=sum(member.wire_bytes * member.executions for member in members),
                overlapped=beside / total if total else 0.0,
                seconds=sum(
                    roofline.collective_seconds(member, link, assumed) * member.executions for member in members
                ),
            )
        )
    return sorted(found, key=lambda exchange: -exchange.seconds)


def as_text(plan: Plan) -> str:
    """The plan for a terminal, at most 120 columns."""
    return "\n".join((*_head(plan), "", *_memory(plan), "", *_exchange_table(plan), "", *_time(plan), "", *_run(plan)))


def _head(plan: Plan) -> list[str]:
    compiled, model, train = plan.compiled, plan.compiled.run.model, plan.compiled.run.train
    rows, parts = sequences_per_device(compiled), train.gradient_accumulation_steps
    return [
        f"{compiled.target}: {compiled.target.size:,} x {compiled.target.chip.kind}, mesh "
        + " x ".join(f"{name} {size}" for name, size in compiled.mesh.items()),
        f"a step: {train.global_batch_size:,} sequences of {model.n_positions:,} tokens"
        + (f" in {parts} parts" if parts > 1 else "")
        + f", {rows} at once on a device; remat {model.remat}, unroll {model.unroll}, "
        f"loss_chunk {compiled.config.train.loss_chunk}",
    ]


def _memory(plan: Plan) -> list[str]:
    compiled = plan.compiled
    lines = ["memory of a device when it uses most, GB (compiled)"]
    for name, size in compiled.memory.items():
        bar = "#" * min(80, round(40 * size / plan.memory_limit))
        lines.append(f"  {name:26}{size / GB:8.2f}  {bar}".rstrip())
    total = compiled.memory_bytes
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(f"  {'total':26}{total / GB:8.2f}  {verdict}: {total / plan.memory_limit:.0%} of {_limit(plan)}")
    return lines


def _limit(plan: Plan) -> str:
    capacity, fraction = plan.compiled.target.chip.memory / GB, plan.assumed.memory_fraction
    reserved = "" if fraction == 1 else f" ({fraction:.0%} of {capacity:.1f}; the rest is for the runtime)"
    return f"{plan.memory_limit / GB:.1f} GB{reserved}"


def _exchange_table(plan: Plan) -> list[str]:
    if plan.compiled.target.size == 1:
        return ["exchange between devices: none"]
    lines = [
        "exchange in a step (compiled)",
        f"  {'':19}{'':5}{'link':14}{'group':>6}{'count':>7}{'GB':>9}{'GB sent':>9}{'overlapped':>12}{'ms':>9}",
    ]
    small = [exchange for exchange in plan.exchanges if exchange.bytes < 1e6]
    for exchange in plan.exchanges:
        if exchange not in small:
            lines.append(
                f"  {exchange.kind:19}{exchange.dtype:5}{exchange.link:14}{exchange.group_size:6}{exchange.count:7}"
                f"{exchange.bytes / GB:9.3f}{exchange.wire_bytes / GB:9.3f}{exchange.overlapped:12.0%}"
                f"{exchange.seconds * 1e3:9.1f}"
            )
    if small:
        lines.append(
            f"  {sum(exchange.count for exchange in small)} more of under 1 MB altogether: "
            f"{sum(exchange.seconds for exchange in small) * 1e3:.1f} ms"
        )
    return lines


def _time(plan: Plan) -> list[str]:
    time, assumed, chip = plan.time, plan.assumed, plan.compiled.target.chip
    tokens = plan.tokens_per_step
    columns = ("products", "memory", "exposed", "seconds", "hidden")
    lines = [
        "time of a step, ms (predicted, not measured)",
        f"  {'':12}{'products':>10}{'memory':>10}{'exchange':>10}{'total':>10}   {'beside it: exchange hidden':26}",
    ]
    for phase in PHASES:
        values = [getattr(time.phases[phase], column) * 1e3 for column in columns]
        lines.append(f"  {phase:12}" + "".join(f"{value:10.1f}" for value in values[:4]) + f"   {values[4]:10.1f}")
    totals = [time.total(column) * 1e3 for column in columns]
    lines.append(f"  {'step':12}" + "".join(f"{value:10.1f}" for value in totals[:4]) + f"   {totals[4]:10.1f}")
    return [
        *lines,
        f"  what binds most: {time.limit}",
        f"  FLOPs a token: model {plan.model_flops / tokens / GB:.2f} G (6N + 12LdT), hardware "
        f"{plan.hardware_flops / tokens / GB:.2f} G (recomputation counted, of attention the causal half)",
        f"  assumed: products {assumed.product_fraction:.0%} of {chip.peak_flops / 1e12:.0f} TFLOP/s, attention "
        f"{assumed.attention_fraction:.0%}; memory {assumed.hbm_fraction:.0%} of {chip.hbm_bandwidth / GB:,.0f} GB/s;",
        f"  {_links(plan)}; {assumed.latency * 1e6:.0f} us a collective",
        "  an exchange is hidden if the compiler scheduled something to compute beside it, as long as that lasts",
        *textwrap.wrap(f"calibration: {assumed.calibration}", 118, initial_indent="  ", subsequent_indent="    "),
        *(f"  not known: {what}" for what in plan.compiled.unknown),
    ]


def _links(plan: Plan) -> str:
    chip, assumed = plan.compiled.target.chip, plan.assumed
    of = f"{assumed.link_fraction:.0%} of "
    if chip.platform == "tpu":
        return f"ICI {of}{chip.link_bandwidth / GB:.0f} GB/s a link"
    return (
        f"links {of}{chip.link_bandwidth / GB:.0f} GB/s in a host, {chip.network_bandwidth / GB:.0f} a device between"
    )


def _run(plan: Plan) -> list[str]:
    steps, chip, config = plan.compiled.run.train.steps, plan.compiled.target.chip, plan.compiled.config
    if isinstance(config, FinetuneConfig) and not config.train.steps:
        # How many steps there are, the examples decide, which are not read here.
        rate = config.train.global_batch_size / plan.time.seconds
        return [
            f"{rate:,.1f} examples/s of the longest rows, {plan.mfu:.1%} MFU: an epoch of 10,000 examples takes "
            f"{10_000 / rate / 60:,.0f} minutes at most"
        ]
    lines = [
        f"{plan.tokens_per_second:,.0f} tokens/s, {plan.mfu:.1%} MFU",
        f"{steps:,} steps, {steps * plan.tokens_per_step / 1e9:,.1f}e9 tokens: {plan.days:.2f} days, "
        f"{plan.device_hours:,.0f} device-hours",
    ]
    if plan.kwh is not None:
        lines.append(
            f"{plan.kwh:,.0f} kWh ({chip.power:.0f} W a device x PUE {plan.assumed.pue}), "
            f"{plan.kwh * plan.assumed.grid / 1000:,.1f} t of CO2 ({plan.assumed.grid} kg/kWh)"
        )
    else:
        lines.append(f"energy: the power of {chip.name} is not published")
    if plan.price is not None:
        lines.append(f"cost: {plan.device_hours * plan.price:,.0f} at {plan.price:g} a device-hour")
    return lines
