"""Reads optimized HLO, the text of a compiled program: how often each instruction runs, and what devices exchange.

`jax.stages.Compiled.as_text()` prints a program as it was scheduled: computations, of which loops, fusions and
asynchronous operations call one another. XLA's compilers write the same collective in several ways; here they become
one `Collective` each:

- one instruction, `all-gather`, or two with others between them, `all-gather-start` and `all-gather-done` (GPU)
- `async-start` and `async-done` around a computation that holds it
- `async-collective-start`, fusions that compute meanwhile, `async-collective-done` (TPU): the instruction is in each
- a fusion that calls `all-reduce-scatter`, which is how XLA's TPU compiler spells a reduce-scatter
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Collection, Iterator

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COPIES = ("copy", "copy-start", "copy-done", "bitcast")

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}

# Instructions that neither compute nor move data of their own, and exchanges, which do neither on the device.
BOOKKEEPING = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "add-dependency",
    "opt-barrier",
    "partition-id",
    "replica-id",
    *KINDS,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's type."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size in bytes, without the padding of TPU tiles."""
        bits = _BITS.get(self.dtype) or int((re.search(r"\d+", self.dtype) or "0")[0])
        return self.size * bits // 8


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type as HLO prints it, those of a tuple in order."""
    # A layout, {1,0:T(8,128)(2,1)S(1)}, has no square brackets.
    found = re.findall(r"\b([a-z]\w*)\[([\d,<= ]*)\]", text)
    return tuple(Shape(dtype, tuple(int(d) for d in re.findall(r"\d+", dims))) for dtype, dims in found)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    """As printed, layouts included."""
    opcode: str
    operands: tuple[str, ...]
    """Names of instructions of the same computation; of a parameter or a constant, what its parentheses hold."""
    attributes: str
    """All that follows the operands."""

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of the result."""
        return shapes(self.type)

    @property
    def op_name(self) -> str:
        """The JAX operation that it comes from, 'jit(train_step)/jvp()/while/body/dot_general'; empty if unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def calls(self) -> tuple[str, ...]:
        """Names of the computations that it runs; the sums of reductions do not count."""
        keys = "calls|body|condition|branch_computations|called_computations|true_computation|false_computation"
        if self.opcode.startswith("call"):
            keys += "|to_apply"
        found = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return tuple(name for names in found for name in re.findall(r"[\w.\-]+", names))

    def called(self, key: str) -> str:
        """The computation named by one attribute, such as `body`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they are scheduled; the last is the result."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that take each one's result."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in instruction.operands:
                found.setdefault(operand, []).append(instruction)
        return found

    def behind(self, name: str, opcodes: Collection[str]) -> Instruction | None:
        """What an instruction has its value from, through others of these opcodes; None if it is not of this one."""
        instruction = self.by_name.get(name)
        while instruction is not None and instruction.opcode in opcodes:
            instruction = self.by_name.get(instruction.operands[0])
        return instruction


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program for one of the devices that run it."""

    computations: dict[str, Computation]
    entry: str
    devices: int
    """How many run it together."""

    def __iter__(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Each instruction with its computation, and how often one run of the program executes it."""
        for name, count in self.executions.items():
            computation = self.computations[name]
            for instruction in computation.instructions:
                yield computation, instruction, count

    @functools.cached_property
    def callers(self) -> dict[str, list[tuple[Computation, Instruction]]]:
        """Who calls each computation."""
        found: dict[str, list[tuple[Computation, Instruction]]] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions:
                for name in instruction.calls:
                    found.setdefault(name, []).append((computation, instruction))
        return found

    @functools.cached_property
    def executions(self) -> dict[str, int]:
        """How often each computation runs in one run of the program.

        Loops multiply; of a conditional every branch counts; a loop whose length is not known counts once (see
        `unknown_loops`).
        """
        memo = {self.entry: 1}

        def count(name: str) -> int:
            if name not in memo:
                memo[name] = 0  # a cycle would not be HLO
                memo[name] = sum(
                    count(computation.name) * self._times(computation, caller)
                    for computation, caller in self.callers.get(name, ())
                )
            return memo[name]

        return {name: executions for name in self.computations if (executions := count(name))}

    def op_name(self, computation: Computation, instruction: Instruction) -> str:
        """The JAX operation that an instruction comes from; empty if unknown.

        Where the compiler kept none, it is that of something inside (a fusion), of what runs it (a loop), or of its
        neighbours in a loop.
        """
        inner = (other for name in instruction.calls for other in self.computations[name].instructions)
        for candidate in (instruction, *inner):
            if candidate.op_name:
                return candidate.op_name
        for outer in self.callers.get(computation.name, ()):
            if name := self.op_name_around(*outer):
                return name
        if computation.name == self.entry:
            return ""
        return next((other.op_name for other in reversed(computation.instructions) if other.op_name), "")

    def op_name_around(self, computation: Computation, instruction: Instruction) -> str:
        """The JAX operation of an instruction, or else of what runs it; empty if unknown."""
        if instruction.op_name:
            return instruction.op_name
        callers = self.callers.get(computation.name, ())
        return next((name for outer in callers if (name := self.op_name_around(*outer))), "")

    @property
    def unknown_loops(self) -> tuple[str, ...]:
        """Names of the loops whose length cannot be read off."""
        return tuple(
            instruction.name
            for computation, instruction, _ in self
            if instruction.opcode == "while" and self.trip_count(computation, instruction) is None
        )

    def _times(self, computation: Computation, caller: Instruction) -> int:
        if caller.opcode != "while":
            return 1
        return self.trip_count(computation, caller) or 1

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a `while` of the computation runs its body; None where that is not known."""
        known = re.search(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        # XLA does not always say: i < 32 in the condition, and where i starts.
        condition = self.computations.get(loop.called("condition"))
        if condition is None:
            return None
        compare = root = condition.instructions[-1]
        sides: list[Instruction | None] = [condition.by_name.get(name) for name in root.operands]
        if root.opcode == "fusion" and root.calls:
            # Constants may be inside the fusion, what comes from outside is a parameter of it.
            body, outside = self.computations[root.calls[0]], sides
            compare = body.instructions[-1]
            sides = [body.by_name.get(name) for name in compare.operands]
            sides = [
                outside[int(side.operands[0])] if side is not None and side.opcode == "parameter" else side
                for side in sides
            ]
        direction = re.search(r"direction=(\w+)", compare.attributes)
        if direction is None or len(sides) != 2:
            return None
        left, right = sides
        if left is None or right is None or left.opcode != "get-tuple-element":
            return None
        end, index = _constant(right), re.search(r"index=(\d+)", left.attributes)
        if end is None or index is None or direction[1] not in ("LT", "LE"):
            return None
        tuple_ = computation.by_name.get(loop.operands[0])
        if tuple_ is None or tuple_.opcode != "tuple":
            return None
        start = _constant(computation.behind(tuple_.operands[int(index[1])], _COPIES))
        return None if start is None else end - start + (direction[1] == "LE")


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant" or not instruction.operands:
        return None
    return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")


def parse(text: str) -> Module:
    """The module that `text` prints, such as that of `compiled.as_text()`.

    Raises:
      ValueError: it is no HLO module.
    """
    header = re.search(r"^HloModule .*", text, re.MULTILINE)
    if header is None:
        raise ValueError(f"not the text of an HLO module: {text[:60]!r}")
    devices = [int(count) for count in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header[0])]
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if line.startswith("}"):
            computations[name] = Computation(name, tuple(instructions))
        elif line.endswith("{") and (found := _COMPUTATION.match(line)):
            name, instructions = found[2], []
            entry = name if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[1], _COMMENT.sub("", found[2]))
            instructions += [*_elements(instruction, instructions), instruction]
    if entry not in computations:
        raise ValueError("the HLO module has no entry computation")
    return Module(computations, entry, math.prod(devices))


def _instruction(name: str, text: str) -> Instruction:
    split = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, rest = text[:split], text[split:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    inside = rest[start + 1 : end - 1]
    operands = tuple(re.findall(r"%([\w.\-#]+)", inside))
    if not operands and inside and rest[:start] in ("constant", "parameter"):
        operands = (inside,)
    elif not operands and inside:
        operands = tuple(part.split()[-1] for part in inside.split(", "))
    return Instruction(name, kind, rest[:start], operands, rest[end:])


def _elements(user: Instruction, before: list[Instruction]) -> Iterator[Instruction]:
    """The elements of tuples that an instruction of a dump names as `%tuple#1`, as instructions of that name."""
    for name in user.operands:
        if "#" in name and all(instruction.name != name for instruction in before):
            whole, _, index = name.rpartition("#")
            element = next((_parts(other.type)[int(index)] for other in before if other.name == whole), "")
            yield Instruction(name, element, "get-tuple-element", (whole,), f", index={index}")


def _parts(kind: str) -> list[str]:
    """The types that a tuple's type consists of."""
    parts, start, depth = [], 1, 0
    for place, character in enumerate(kind):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(character, 0)
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            parts.append(kind[start:place].strip())
            start = place + 1
    return parts


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return len(text)


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices."""

    name: str
    """Of its instruction."""
    kind: str
    """One of `KINDS`."""
    dtype: str
    """Of what is exchanged; of several arrays at once, the type of most bytes."""
    bytes: int
    """Of the whole: what an all-gather makes, what the others take on one device."""
    executions: int
    """In one run of the program."""
    groups: tuple[tuple[int, ...], ...]
    """Which devices exchange with each other, by their places in the mesh; pairs of source and target of a permute."""
    asynchronous: bool
    """Whether something is computed between its start and its end."""
    op_name: str
    """The JAX operation that it comes from; empty if unknown."""
    operands: tuple[Shape, ...]
    """What a device puts in."""

    @property
    def group_size(self) -> int:
        """How many devices exchange with each other."""
        return max(map(len, self.groups))

    @property
    def wire_bytes(self) -> float:
        """What a device sends each time, at the least: around a ring, n - 1 of n parts; twice that for all-reduce."""
        if self.kind == "collective-permute":
            return float(self.bytes)
        n = self.group_size
        return self.bytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


def collectives(module: Module) -> list[Collective]:
    """Every collective of a program that runs, in the order of the text."""
    found = []
    for computation, instruction, executions in module:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS or _goes_on(module, computation):
            continue
        operands = tuple(
            shape for name in instruction.operands for shape in _operand_shapes(computation.by_name.get(name))
        )
        groups = _groups(instruction, module.devices)
        size = max(map(len, groups))
        total = sum(shape.bytes for shape in operands)
        if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
            kind = "reduce-scatter"
        by_type: dict[str, int] = {}
        for shape in operands:
            by_type[shape.dtype] = by_type.get(shape.dtype, 0) + shape.bytes
        found.append(
            Collective(
                name=instruction.name,
                kind=kind,
                dtype=max(by_type, key=lambda dtype: by_type[dtype], default=""),
                bytes=total * size if kind == "all-gather" else total,
                executions=executions,
                groups=groups,
                asynchronous=_asynchronous(module, computation, instruction),
                op_name=module.op_name(computation, instruction),
                operands=operands,
            )
        )
    return found


def _operand_shapes(operand: Instruction | None) -> tuple[Shape, ...]:
    return () if operand is None else tuple(shape for shape in operand.shapes if shape.dtype != "token")


def _goes_on(module: Module, computation: Computation) -> bool:
    """Whether a computation continues or ends a collective that another one started (TPU)."""
    callers = module.callers.get(computation.name, ())
    return "async_collective_fusion" in computation.name or any(
        "async-collective-done" in caller.name or re.search(r"-(?:done|update)$", caller.opcode)
        for _, caller in callers
    )


def _asynchronous(module: Module, computation: Computation, instruction: Instruction) -> bool:
    if instruction.opcode.endswith("-start"):
        return _computes_meanwhile(computation, instruction)
    # Wrapped: `async-start`, or a fusion or a call that starts it.
    return any(
        _computes_meanwhile(outer, caller)
        for outer, caller in module.callers.get(computation.name, ())
        if caller.opcode.endswith("-start") or "async-collective-start" in caller.name
    )


def _computes_meanwhile(computation: Computation, start: Instruction) -> bool:
    """Whether the schedule has something to compute between an instruction and the one that ends what it started."""
    done = _done(computation, start)
    order = computation.instructions
    first = order.index(start)
    if done is None:
        # Handed on to the loop's next iteration.
        return any(map(_computes, order[first + 1 :]))
    return any(map(_computes, itertools.takewhile(lambda other: other is not done, order[first + 1 :])))


def _done(computation: Computation, start: Instruction) -> Instruction | None:
    if "async-collective-start" in start.name:
        return computation.by_name.get(start.name.replace("async-collective-start", "async-collective-done"))
    seen, pending = {start.name}, [start.name]
    while pending:
        for user in computation.users.get(pending.pop(), ()):
            if user.opcode.endswith("-done"):
                return user
            if user.opcode.endswith("-update") and user.name not in seen:
                seen.add(user.name)
                pending.append(user.name)
    return None


def _computes(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    if "async-collective-" in instruction.name or re.search(r"-(?:start|update|done)$", opcode):
        return False
    return opcode not in BOOKKEEPING


def _groups(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """The devices that exchange with each other; all of them where the program does not say."""
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        found = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
        return tuple((int(source), int(target)) for source, target in found) or ((0,),)
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", text):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    if tiled := re.search(rf"replica_groups=\[(\d+),(\d+)\]({_IOTA})", text):
        return _rows(_iota(tiled[3]).reshape(int(tiled[1]), int(tiled[2])))
    if mesh := re.search(rf"replica_groups=@?mesh\[([^\]]*)\](.*?device_ids=\(?{_IOTA}\)?)?\s*\{{([^}}]*)\}}", text):
        return _mesh_groups(mesh[1], mesh[2] or "", mesh[3])
    return (tuple(range(devices)),)


# Numbers 0 to n - 1 as an array, perhaps transposed: <=[8,16]T(1,0).
_IOTA = r"<=\[[\d,]+\](?:T\([\d,]+\))?"


def _iota(text: str) -> np.ndarray:
    dims, axes = re.search(r"<=\[([\d,]+)\]", text), re.search(r"T\(([\d,]+)\)", text)
    assert dims
    shape = [int(dim) for dim in dims[1].split(",")]
    array = np.arange(math.prod(shape)).reshape(shape)
    return array.transpose([int(axis) for axis in axes[1].split(",")]) if axes else array


def _mesh_groups(axes: str, device_ids: str, exchanging: str) -> tuple[tuple[int, ...], ...]:
    """Of mesh['replica'=2,'fsdp'=8] {'fsdp'}, or {'fsdp':(2)4}: the four devices of each half of a row of `fsdp`."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", axes)}
    wanted = [
        (name, int(before or 1), int(size or 0) or sizes[name])
        for name, before, size in re.findall(r"'?([A-Za-z_][\w.]*)'?(?::\((\d+)\)(\d+))?", exchanging)
    ]
    # Every axis cut at the ends of the parts that are wanted of it.
    dims: list[int] = []
    places: dict[tuple[str, int, int], list[int]] = {}
    for name, size in sizes.items():
        parts = [(before, length) for axis, before, length in wanted if axis == name]
        cuts = sorted({1, size} | {cut for before, length in parts for cut in (before, before * length)})
        for low, high in itertools.pairwise(cuts):
            for before, length in parts:
                if before <= low and high <= before * length:
                    places.setdefault((name, before, length), []).append(len(dims))
            dims.append(high // low)
    order = [place for part in wanted for place in places.get(part, [])]
    ids = (_iota(device_ids) if device_ids else np.arange(math.prod(sizes.values()))).reshape(dims or [1])
    rest = [place for place in range(len(dims)) if place not in order]
    return _rows(ids.transpose(rest + order).reshape(-1, math.prod(dims[place] for place in order)))


def _rows(array: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(value) for value in row) for row in array)
