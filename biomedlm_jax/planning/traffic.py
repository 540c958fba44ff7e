"""How many bytes of memory the operations of a compiled step read and write that are no products."""

import dataclasses
import re
from collections.abc import Iterator

from biomedlm_jax import hlo
from biomedlm_jax.planning.flops import Phase, phase_of

# What moves no data of its own: what it runs does, or nothing.
_FREE = hlo.BOOKKEEPING | {"while", "conditional", "call"}
_PRODUCTS = {"dot", "convolution", "ragged-dot"}
_KERNELS = re.compile(r"gemm|cudnn|flash_attention|mosaic|triton|tpu_custom_call|xla\.gpu|MatMul|Conv")


@dataclasses.dataclass(frozen=True)
class Access:
    """What one instruction reads and writes."""

    name: str
    phase: Phase
    bytes: int
    executions: int


def accesses(module: hlo.Module) -> list[Access]:
    """The instructions that stream through memory: all but products, kernels, and exchanges between devices."""
    return [access for access in _accesses(module) if access.bytes]


def _accesses(module: hlo.Module) -> Iterator[Access]:
    fused = {
        name
        for computation in module.computations.values()
        for instruction in computation.instructions
        if instruction.opcode == "fusion"
        for name in instruction.calls
    }
    for computation, instruction, executions in module:
        opcode = instruction.opcode
        if computation.name in fused or opcode in _FREE or re.search(r"-(?:start|done|update)$", opcode):
            continue
        if opcode == "custom-call" and ("AllocateBuffer" in instruction.attributes or not instruction.operands):
            continue
        if _multiplies(module, instruction):
            continue
        phase = phase_of(module.op_name(computation, instruction))
        yield Access(instruction.name, phase, _bytes(module, computation, instruction), executions)


def _multiplies(module: hlo.Module, instruction: hlo.Instruction) -> bool:
    if instruction.opcode in _PRODUCTS:
        return True
    if instruction.opcode == "custom-call":
        return bool(_KERNELS.search(instruction.attributes))
    return any(
        inner.opcode in _PRODUCTS or inner.opcode in hlo.KINDS or (inner.calls and _multiplies(module, inner))
        for name in instruction.calls
        for inner in module.computations[name].instructions
    )


def _bytes(module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> int:
    if instruction.opcode == "fusion":
        return _fusion_bytes(module, computation, instruction)
    if instruction.opcode in ("dynamic-slice", "slice", "gather", "broadcast", "iota"):
        return _in_hbm(instruction.type) * (1 if instruction.opcode in ("broadcast", "iota") else 2)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _operand_bytes(computation, instruction.operands[1])
    return _in_hbm(instruction.type) + sum(_operand_bytes(computation, name) for name in instruction.operands)


def _fusion_bytes(module: hlo.Module, computation: hlo.Computation, fusion: hlo.Instruction) -> int:
    body = module.computations[fusion.calls[0]]
    total = 0
    for inner in body.instructions:
        if inner.opcode != "parameter":
            continue
        operand = computation.by_name.get(fusion.operands[int(inner.operands[0])])
        if operand is not None and "S(" not in operand.type:
            total += _read(body, inner)
    root = body.instructions[-1]
    results = root.operands if root.opcode == "tuple" else (root.name,)
    for name, shape in zip(results, hlo.shapes(fusion.type), strict=False):
        written = body.behind(name, ("bitcast",))
        if written is not None and written.opcode == "dynamic-update-slice":
            total += _operand_bytes(body, written.operands[1])  # in place
        elif "S(" not in fusion.type:
            total += shape.bytes
    return total


def _read(body: hlo.Computation, value: hlo.Instruction) -> int:
    """How much of a fusion's operand it reads: of a large one perhaps only a slice, or nothing if that is replaced."""
    total = 0
    for user in body.users.get(value.name, ()):
        if user.opcode == "bitcast":
            total += _read(body, user)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
            total += sum(shape.bytes for shape in user.shapes)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == value.name):
            return sum(shape.bytes for shape in value.shapes)
    return min(total, sum(shape.bytes for shape in value.shapes))


def _operand_bytes(computation: hlo.Computation, name: str) -> int:
    operand = computation.by_name.get(name)
    return _in_hbm(operand.type) if operand is not None else 0


def _in_hbm(kind: str) -> int:
    """Bytes of the arrays of a type that do not lie in a core's own memory, S(1) and up."""
    return sum(
        shape.bytes for part in re.split(r",(?=\s*\w+\[)", kind) if "S(" not in part for shape in hlo.shapes(part)
    )
