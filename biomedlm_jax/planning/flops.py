"""Products of a traced step: how many FLOPs each device spends on them, recomputation included."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

Phase = Literal["forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")

# Products that a kernel of causal attention computes, each of 2 B S^2 H D / 2 FLOPs. Forward: scores, and their product
# with the values. For dq: scores, their gradient, dq. For dk and dv: scores, their gradient, dk, dv. Fused: each once.
_ATTENTION_PRODUCTS = {
    "flash_attention": 2,
    "flash_attention_forward": 2,
    "flash_attention_dq": 3,
    "flash_attention_dkv": 4,
    "flash_attention_backward": 5,
    "dot_product_attention_fwd": 2,
    "dot_product_attention_bwd": 5,
}


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product, or an attention kernel, as often as a step computes it."""

    phase: Phase
    flops: float
    """Of one device, each time."""
    bytes: float
    """Its operands and its result on one device."""
    executions: int
    attention: bool


def phase_of(op_name: str) -> Phase:
    """The part of a step that an operation belongs to, by the name that jax gives it."""
    if "transpose(" in op_name or "rematted_computation" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "optimizer"


def products(jaxpr: Any, devices: int) -> list[Product]:
    """The products of a step traced for so many devices.

    Outside of `shard_map` arrays are global, and the devices share their products evenly; inside, they are a device's.
    """
    return list(_products(jaxpr, 1, devices, ""))


def _products(jaxpr: Any, executions: int, devices: int, outer_name: str) -> Iterator[Product]:
    for equation in jaxpr.eqns:
        primitive, params = equation.primitive.name, equation.params
        name = f"{outer_name}/{equation.source_info.name_stack}"
        if primitive == "dot_general":
            yield Product(phase_of(name), _dot_flops(equation) / devices, _bytes(equation) / devices, executions, False)
        elif (kernel := _attention_kernel(equation)) is not None:
            yield Product(
                phase_of(name),
                _attention_flops(equation, kernel) / devices,
                _bytes(equation) / devices,
                executions,
                True,
            )
        elif primitive == "shard_map":
            manual = params.get("manual_axes") or params["mesh"].axis_names
            shards = math.prod(params["mesh"].shape[axis] for axis in manual)
            yield from _products(params["jaxpr"], executions, max(1, devices // shards), name)
        else:
            times = params["length"] if primitive == "scan" else 1
            remat = f"{name}/rematted_computation" if primitive in ("remat", "remat2", "checkpoint") else name
            for inner in _inner(params):
                yield from _products(inner, executions * times, devices, remat if "transpose(" in name else name)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for candidate in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(candidate, "jaxpr", candidate)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _bytes(equation: Any) -> float:
    avals = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    return sum(aval.size * aval.dtype.itemsize for aval in avals if hasattr(aval, "size"))


def _attention_kernel(equation: Any) -> str | None:
    """Which kernel of `_ATTENTION_PRODUCTS` an operation is: Pallas's of this package, or cuDNN's."""
    primitive = equation.primitive.name
    if primitive in ("pallas_call", "mpmd_map", "core_map"):
        name = str(equation.params.get("name") or equation.source_info.name_stack).rpartition("/")[2]
        return name if name in _ATTENTION_PRODUCTS else None
    found = re.match(r"dot_product_attention_(?:fwd|bwd)", primitive)
    return found[0] if found else None


def _attention_flops(equation: Any, kernel: str) -> float:
    """Of causal attention, as if nothing above the diagonal were computed."""
    # Ours take the packed projection, [batch, seq, 3 x heads, head_dim] or [batch, seq, 3 x heads x head_dim].
    batch, seq, *width = next(variable.aval.shape for variable in equation.invars if len(variable.aval.shape) >= 3)
    packed = 3 if kernel.startswith("flash") else 1
    return _ATTENTION_PRODUCTS[kernel] * batch * seq**2 * math.prod(width) / packed
