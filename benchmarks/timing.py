"""What the benchmarks share: processes that may hang, random inputs, dependent calls, and errors to a reference.

What is timed is a loop of dependent calls in one program (`Chain`). The host waits once, at its end, so the time of
one launch is not in the numbers; what is left of it is not subtracted.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Sets of inputs used in turn. Together larger than any L2 cache, so a call does not find its inputs there.
SETS = 3

CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu", "clocks_event_reasons.active")


class Shape(NamedTuple):
    """Of causal attention, in bfloat16."""

    batch: int
    seq: int
    heads: int
    head_dim: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return "x".join(map(str, self))

    def operations(self, which: str) -> float:
        """Floating-point operations of the causal half: what must be computed, not what a kernel happens to."""
        forward = 4 * self.batch * self.heads * self.seq**2 * self.head_dim / 2
        return forward * {"forward": 1, "backward": 2.5, "packed": 3.5}[which]

    def inputs(self, seed: int) -> tuple[Any, Any]:
        """A random packed projection and a random gradient of the output; never zeros, which run faster."""
        import jax
        import jax.numpy as jnp

        keys = jax.random.split(jax.random.key(seed))
        batch, seq, heads, head_dim = self
        qkv = jax.random.normal(keys[0], (batch, seq, 3 * heads, head_dim), jnp.bfloat16)
        return qkv, jax.random.normal(keys[1], (batch, seq, heads, head_dim), jnp.bfloat16)


# The last one is of BioMedLM's little sisters.
SHAPES = (Shape(32, 1024, 20, 128), Shape(16, 2048, 20, 128), Shape(8, 4096, 20, 128), Shape(32, 1024, 12, 64))
SMALL_SHAPES = (Shape(2, 80, 2, 64),)

# Time.


class Loop(NamedTuple):
    """How much is timed."""

    rounds: int
    """Through all sets, in one program."""
    repeats: int
    """Of the program."""

    @property
    def calls(self) -> int:
        return self.rounds * SETS


LOOP = Loop(rounds=20, repeats=10)
SMALL_LOOP = Loop(rounds=1, repeats=2)


def summary(seconds: list[float], loop: Loop) -> dict[str, float]:
    """Median and spread of one call's time, of the times of programs of `loop.calls` calls."""
    ms = [1e3 * s / loop.calls for s in seconds]
    return {"ms": statistics.median(ms), "ms_min": min(ms), "ms_max": max(ms), "calls": loop.calls * loop.repeats}


class Chain:
    """`step(fixed, moving)` on each set in turn, again and again, in one program, where no call can be left out.

    Each call's `moving` holds in its first row (of head_dim numbers) the sum of the first rows of the outputs of the
    call before, so the calls depend on each other at the price of reading and writing one row, a few microseconds
    in a kernel of its own. The outputs of the last round are returned, so every call must write them in full: a
    layout change at their end cannot be skipped. All buffers that change are donated, so none is copied.
    """

    def __init__(self, step: Callable[[Any, Any], Any], fixed: list[Any], moving: list[Any], loop: Loop):
        import jax
        import jax.numpy as jnp

        self.fixed, self.moving, self.loop = fixed, moving, loop
        self.step = jax.jit(step)  # so that it is traced once for all sets
        results = [jax.eval_shape(step, f, m) for f, m in zip(fixed, moving, strict=True)]
        self.outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)
        begin = time.perf_counter()
        program = jax.jit(functools.partial(_chain, self.step, loop.rounds), donate_argnums=(1, 2))
        self.program = program.lower(fixed, self.moving, self.outputs).compile()
        self.compile_s = round(time.perf_counter() - begin, 2)

    def time(self) -> dict[str, float]:
        import jax

        def run() -> float:
            begin = time.perf_counter()
            self.moving, self.outputs = self.program(self.fixed, self.moving, self.outputs)
            jax.block_until_ready(self.outputs)
            return time.perf_counter() - begin

        run()  # warm-up
        return {**summary([run() for _ in range(self.loop.repeats)], self.loop), "compile_s": self.compile_s}


def _chain(step: Any, rounds: int, fixed: list[Any], moving: list[Any], outputs: list[Any]) -> tuple[Any, Any]:
    import jax

    def body(carry: Any, _: None) -> Any:
        moving, outputs = map(list, carry)
        for i in range(len(moving)):
            outputs[i] = step(fixed[i], moving[i])
            after = (i + 1) % len(moving)
            moving[after] = feed(moving[after], outputs[i])
        return (moving, outputs), None

    return jax.lax.scan(body, (moving, outputs), length=rounds)[0]


def feed(moving: Any, outputs: Any) -> Any:
    """`moving` with the sum of the outputs' first rows in its own first row, kept within [-1, 1]."""
    import jax
    import jax.numpy as jnp

    row = sum(leaf[(0,) * (leaf.ndim - 1)] for leaf in jax.tree.leaves(outputs))
    return moving.at[(0,) * (moving.ndim - 1)].set(jnp.tanh(row))


# Correctness.

MAX_ERROR = 1e-2
# Calls on the same inputs that must agree in every bit.
RACE_CALLS = 10


def fill_memory_with_nan(like: list[Any], copies: int = 3) -> None:
    """Leaves nan where the allocator will put the next arrays of these sizes: what a kernel does not write shows."""
    import jax
    import jax.numpy as jnp

    for array in jax.block_until_ready([jnp.full(x.shape, jnp.nan, x.dtype) for x in like for _ in range(copies)]):
        array.delete()


def relative_error(x: Any, reference: Any) -> float:
    """Of the Euclidean norms, in float32; nan where `x` holds one."""
    import jax.numpy as jnp

    return float(jnp.linalg.norm((x.astype(jnp.float32) - reference).ravel()) / jnp.linalg.norm(reference.ravel()))


def equal_bits(x: Any, y: Any) -> bool:
    """Of all arrays of two trees; nan equals itself."""
    import jax

    def bits(array: Any) -> Any:
        return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")

    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return all(bool((bits(a) == bits(b)).all()) for a, b in pairs)


def reference_rows(batch: int) -> list[int]:
    """Rows of a batch that are compared with a reference: the first and the last."""
    return sorted({0, batch - 1})


def reference_gradients(qkv: Any, d_out: Any, scale: float) -> dict[str, Any]:
    """Output and gradients of `reference_rows`, in float32 at the highest precision, one row after the other."""
    import jax
    import jax.numpy as jnp

    from biomedlm_jax.kernels import reference

    @jax.jit
    def row(qkv: Any, d_out: Any) -> Any:
        out, vjp = jax.vjp(lambda qkv: reference.attention(qkv, scale), qkv)
        return out, *jnp.split(vjp(d_out)[0], 3, axis=2)

    rows = [row(*(x[i : i + 1].astype(jnp.float32) for x in (qkv, d_out))) for i in reference_rows(len(qkv))]
    return dict(zip(("out", "dq", "dk", "dv"), map(jnp.concatenate, zip(*rows, strict=True)), strict=True))


# Processes.


class Died(Exception):
    """The process ended before it had done its work."""


class TimedOut(Died):
    """It was killed for taking too long."""


class Worker:
    """A process of its own for work that may hang or crash: it is then killed, and the next work gets a new one."""

    def __init__(self) -> None:
        self._process: Any = None

    def run(self, function: Callable[..., Iterator[Any]], *args: Any, limit_s: float) -> Iterator[Any]:
        """What the generator `function(*args)` yields, as it comes.

        Raises:
          Died: the process crashed.
          TimedOut: it was not done within `limit_s` seconds.
          RuntimeError: the function raised an exception; says which.
        """
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, end = context.Pipe()
            self._process = context.Process(target=_serve, args=(end,), daemon=True)
            self._process.start()
            end.close()
        deadline = time.monotonic() + limit_s
        try:
            self._connection.send((function, args))
            while True:
                if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                    raise TimedOut(f"killed after {limit_s:.0f} s")
                kind, value = self._connection.recv()
                if kind == "done":
                    return
                if kind == "error":
                    raise RuntimeError(value)
                yield value
        except (EOFError, ConnectionError):
            self._process.join(10)
            code = self._process.exitcode
            self.close()
            raise Died(f"crashed with exit status {code}") from None
        except (Died, GeneratorExit, KeyboardInterrupt):
            self.close()
            raise

    def call(self, function: Callable[..., Iterator[Any]], *args: Any, limit_s: float) -> Any:
        """The one value of a generator."""
        [value] = self.run(function, *args, limit_s=limit_s)
        return value

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(10)  # a process whose kernel hangs may take the driver long to end
            self._connection.close()
            self._process = None


def _serve(connection: Any) -> None:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            function, args = connection.recv()
            try:
                for value in function(*args):
                    connection.send(("value", value))
                connection.send(("done", None))
            except Exception as error:
                connection.send(("error", one_line(error)))


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


# What a report says of the machine.


def query_gpu(*fields: str) -> dict[str, str]:
    """What nvidia-smi reads off the first GPU; empty where there is none."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, map(str.strip, line.split(",")), strict=True))


def clocks() -> dict[str, str]:
    """Clocks, power and temperature at this moment."""
    return query_gpu(*CLOCKS)


def device_kind() -> Iterator[str]:
    """For a `Worker`: a process that asks JAX for its devices holds the accelerator for as long as it lives."""
    import jax

    yield jax.devices()[0].device_kind


def machine(device: str) -> dict[str, Any]:
    """The parts of a report that say where, when and from which code it came."""
    packages = ("biomedlm_jax", "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "numpy", "torch", "tokamax")
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = ""
    with contextlib.suppress(OSError):
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "device": device,
        "driver": query_gpu("driver_version").get("driver_version"),
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "cpu": processor(),
        },
        "versions": versions,
    }


def processor() -> str | None:
    """The CPU's name and generation, as Linux tells them: makers call several generations alike."""
    with contextlib.suppress(OSError):
        told = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M))
        if told.keys() == {"model name", "cpu family", "model"}:
            return f"{told['model name']}, family {told['cpu family']}, model {told['model']}"
    return platform.processor() or None


def report_file(folder: Path, benchmark: str, device: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{benchmark}_{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"


def write_report(path: Path, report: dict[str, Any]) -> None:
    """In one piece: a killed run leaves what it had."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)
