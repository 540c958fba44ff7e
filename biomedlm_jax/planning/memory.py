"""What a device's memory holds when a compiled step needs most of it, from XLA's dumps of its buffers."""

import dataclasses
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from biomedlm_jax import hlo
from biomedlm_jax.config import Config
from biomedlm_jax.planning.flops import phase_of

PARTS = (
    "parameters",
    "moments",
    "gradients",
    "saved activations",
    "logits",
    "weights gathered or cast",
    "workspace",
    "gaps, batch, code",
)


@dataclasses.dataclass(frozen=True)
class Dump:
    """What XLA writes about one program when it is compiled with `xla_dump_to`."""

    hlo: str
    """The optimized program."""
    buffers: str
    """Its allocations and which values lie where in them."""
    live_ranges: str
    """When each value lives, and which ones do when most memory is in use."""


def read_dump(folder: Path) -> Dump:
    """The dump of the one program compiled with `xla_dump_to` that folder; parts that are missing are empty."""

    def read(pattern: str) -> str:
        paths = sorted(folder.glob(pattern), key=lambda path: path.stat().st_size)
        return paths[-1].read_text(errors="replace") if paths else ""

    return Dump(
        read("*after_optimizations.txt"),
        read("*after_optimizations-buffer-assignment.txt"),
        read("*after_optimizations-live-range.txt"),
    )


def total_bytes(stats: Any) -> int:
    """What a program needs of a device by its `memory_analysis`: arguments, results, temporaries, its own code."""
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + results + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes


def parts(stats: Any, dump: Dump, config: Config, fsdp: int, devices: int) -> dict[str, int]:
    """Bytes of each of `PARTS` at the moment of most use; they sum to `total_bytes`.

    Args:
      stats: `compiled.memory_analysis()`.
      fsdp: devices that the parameters are split over.
      devices: devices that the batch is split over.
    """
    found = dict.fromkeys(PARTS, 0)
    buffers = _Buffers(dump)
    for name, size in buffers.arguments:
        found[_argument_part(name)] += size
    classify = _Classifier(config, fsdp, devices, buffers)
    # The largest first: of values that share their place only one is counted.
    taken: dict[str, list[tuple[int, int]]] = {}
    for value in sorted(buffers.live_at_peak(), key=lambda value: -value.size):
        free = _free(taken.setdefault(value.allocation, []), value.offset, value.offset + value.size)
        found[classify(value)] += free
    found["gaps, batch, code"] += total_bytes(stats) - sum(found.values())
    return found


@dataclasses.dataclass(frozen=True)
class _Value:
    """An array in memory."""

    name: str
    shape: hlo.Shape
    op_name: str
    allocation: str
    offset: int
    size: int


class _Buffers:
    """The values of a program, and where they lie."""

    def __init__(self, dump: Dump):
        self.op_names: dict[str, str] = {}
        for line in dump.hlo.splitlines():
            if found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", line):
                self.op_names[found[1]] = found[2]
        self.arguments: list[tuple[str, int]] = []
        self._values: dict[str, _Value] = {}
        self._live_ranges = dump.live_ranges
        allocation, size, temporary, argument = "", 0, False, False
        for line in dump.buffers.splitlines():
            if line.startswith("Total bytes used"):
                break
            if found := re.match(r"allocation (\d+): size (\d+)(.*)", line):
                allocation, rest = found[1], found[3]
                # Of other memories than HBM, such as a TPU core's own, the allocation names a color.
                in_hbm = not re.search(r"color [1-9]", rest)
                temporary = in_hbm and "preallocated-temp" in rest
                argument = in_hbm and bool(re.search(r"parameter \d+", rest))
                size = int(found[2])
            elif found := re.match(r" value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)", line):
                name = found[1]
                if argument and re.search("state|frozen", op_name := self._op_name(name)):
                    self.arguments.append((op_name, size))
                    argument = False
                if temporary and (shapes := hlo.shapes(found[4])) and not found[4].startswith("("):
                    self._values[name] = _Value(
                        name, shapes[0], self._op_name(name), allocation, int(found[3]), int(found[2])
                    )

    def _op_name(self, name: str) -> str:
        return self.op_names.get(_without_index(name), "")

    def live_at_peak(self) -> list[_Value]:
        """The temporary values in memory when most of it is in use.

        What XLA calls its peak counts donated arguments a second time, as the results that take their place.
        """
        changes = []
        for name, start, end in self._ranges():
            if value := self._values.get(name) or self._values.get(_without_index(name)):
                changes += [(start, True, value), (end + 1, False, value)]
        live: dict[_Value, None] = {}  # in the order of the program, which a set would not keep
        peak: list[_Value] = []
        # Values that share a place take its room once.
        users: Counter[tuple[str, int]] = Counter()
        sizes: dict[tuple[str, int], int] = {}
        used = most = 0
        for _, begins, value in sorted(changes, key=lambda change: change[:2]):
            place = value.allocation, value.offset
            if begins:
                live[value] = None
                if not users[place]:
                    sizes[place] = value.size
                    used += value.size
                users[place] += 1
            else:
                live.pop(value, None)
                users[place] -= 1
                if not users[place]:
                    used -= sizes[place]
            if used > most:
                most, peak = used, list(live)
        return peak

    def survives_forward(self) -> set[str]:
        """Names of the values that the forward pass makes and the backward pass still has."""
        sequence = re.findall(r"^\s+(\d+):(\S+)$", self._live_ranges, re.MULTILINE)
        backward = [
            int(place)
            for place, name in sequence
            if phase_of(op_name := self._op_name(name)) == "backward"
            # What it makes of nothing may be made at the very beginning.
            and not re.search(r"^constant|/iota$|/broadcast_in_dim$", f"{name} {op_name}")
        ]
        if not backward:
            return set()
        return {name for name, start, end in self._ranges() if start < min(backward) < end}

    def _ranges(self) -> list[tuple[str, int, int]]:
        """Of each value, its name and its place in the program's sequence when it is made, and when last used."""
        found = re.findall(r"^\s+(\S+?)(\{[\d,]*\}):(\d+)-(\d+)$", self._live_ranges, re.MULTILINE)
        return [(name + index.removesuffix("{}"), int(start), int(end)) for name, index, start, end in found]


def _without_index(name: str) -> str:
    return re.sub(r"\{[\d,]*\}$", "", name)


def _argument_part(op_name: str) -> str:
    if "opt_state" in op_name:
        return "moments"
    return "parameters" if re.search("params|frozen", op_name) else "gaps, batch, code"


def _free(taken: list[tuple[int, int]], start: int, end: int) -> int:
    """How much of a range was not taken yet; takes it."""
    places = [start]
    for low, high in sorted(taken):
        if high > places[-1] and low < end:
            places[-1:] = [places[-1], max(places[-1], low), max(places[-1], high)]
    places.append(max(places[-1], end))
    taken.append((start, end))
    return sum(high - low for low, high in zip(places[::2], places[1::2], strict=True))


class _Classifier:
    """Says which part of memory a temporary value belongs to, by its shape and by what made it."""

    def __init__(self, config: Config, fsdp: int, devices: int, buffers: _Buffers):
        model = config.model
        width, self._layers, self._vocab = model.n_embd, model.n_layer, model.vocab_size
        self._width, self._fsdp = width, fsdp
        rows = config.train.global_batch_size // config.train.gradient_accumulation_steps // devices
        self._tokens, self._positions = rows * model.n_positions, model.n_positions
        # Elements of what FSDP moves: the matrices of a layer, the embeddings.
        layer = (width * width, 3 * width * width, 4 * width * width)
        self._matrices = {*layer, *(size * self._layers for size in layer), self._vocab * width}
        self._survives = buffers.survives_forward()

    def __call__(self, value: _Value) -> str:
        dims = [dim for dim in value.shape.dims if dim != 1]
        elements = math.prod(dims)
        phase = phase_of(value.op_name)
        # The words by themselves, not by the embedding's width or a part of it.
        if self._vocab in dims and not {self._width, self._width // self._fsdp} & set(dims):
            return "logits"
        # Ten rows of 1,024 tokens of width 2,560 have as many elements as a matrix of 2,560 by 10,240.
        of_tokens = {self._positions, self._tokens} & set(dims)
        if not of_tokens and (elements in self._matrices or elements * self._fsdp in self._matrices):
            gathered = (
                "gather" in value.name or "convert_element_type" in value.op_name or "all_gather" in value.op_name
            )
            if value.shape.dtype == "f32" and elements * self._fsdp in self._matrices and not gathered:
                return "gradients"
            return "gradients" if phase == "backward" and not gathered else "weights gathered or cast"
        # A multiple of the tokens: something of each. Stacked over the layers, it is kept for the backward pass.
        if elements and elements % self._tokens == 0:
            stacked = dims[0] == self._layers and elements >= self._layers * self._tokens
            return "saved activations" if stacked or value.name in self._survives else "workspace"
        # What attention keeps: a number a head and token, of all layers.
        if dims and dims[0] == self._layers and elements % (self._layers * self._tokens) == 0:
            return "saved activations"
        return "workspace"
