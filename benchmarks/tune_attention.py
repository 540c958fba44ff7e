"""Finds the fastest block sizes of our attention kernels on this device, and stores them for everybody.

    python benchmarks/tune_attention.py                            # all kernels that serve the device
    python benchmarks/tune_attention.py --backends mosaic_gpu --shapes 32x1024x20x128
    python benchmarks/tune_attention.py --small                    # on a CPU, interpreted: shows that it runs

Writes the winners to biomedlm_jax/kernels/block_sizes.json and all timings to
benchmarks/results/tune_attention_<device>.json; with --out, both to that folder. Both grow with each kernel tuned, so
a run that is stopped keeps what it has.

The forward kernel's block sizes, and those of each kernel of the backward pass, are independent of each other: they
are tuned one after the other, each with the winners before it. A candidate is compared with the float32 reference and
with itself before it is timed. One that is wrong, does not compile (shared memory, mostly), crashes or hangs is
recorded with the reason and passed over; the last two cost the process that measures, which is started anew.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timing
from timing import MAX_ERROR, RACE_CALLS, SETS, Chain, Died, Loop, Shape, TimedOut, Worker

from biomedlm_jax.kernels import block_sizes

# Values to try for the fields of a kernel's `Blocks`, by the last word of their names.
VALUES: dict[str, dict[str, tuple[int, ...]]] = {
    "triton": {"q": (64, 128), "k": (32, 64), "warps": (4, 8), "stages": (2, 3)},
    "mosaic_gpu": {"keys": (64, 128), "queries": (64, 128), "stages": (2, 3, 4), "pong": (0, 1)},
    "mosaic_tpu": {"q": (256, 512, 1024), "k": (256, 512, 1024)},
}

# What the names of the fields begin with, by the kernel that they are of; those that begin with none are the forward's.
KERNELS = ("forward", "backward", "dq", "dkv")

# Less than this faster than the default is noise.
MIN_GAIN = 0.01

# A new process imports JAX and compiles the reference.
START_LIMIT_S = 90

# A millisecond or less a call, and many candidates.
LOOP = Loop(rounds=20, repeats=5)


def groups(backend: str, default: Any) -> dict[str, list[dict[str, Any]]]:
    """For each of the backend's kernels, all candidates: values of the fields of `Blocks` that are its own."""
    fields: dict[str, dict[str, tuple[Any, ...]]] = {}
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        kernel = next((kernel for kernel in KERNELS if field.name.startswith(kernel + "_")), "forward")
        values = VALUES[backend].get(field.name.split("_")[-1], ())
        fields.setdefault(kernel, {})[field.name] = tuple(dict.fromkeys((value, *values)))
    return {
        kernel: [dict(zip(names, values, strict=True)) for values in itertools.product(*names.values())]
        for kernel, names in fields.items()
    }


def pass_of(kernel: str) -> str:
    return "forward" if kernel == "forward" else "backward"


# What runs in the process that may hang or crash.


def serving_backends(interpret: bool) -> Iterator[tuple[str, list[str]]]:
    """The device's kind and the names of the kernels that it runs."""
    from biomedlm_jax.devices import current_device
    from biomedlm_jax.kernels.flash_attention import BACKENDS

    device = current_device()

    def serves(backend: str) -> bool:
        return not importlib.import_module(f"biomedlm_jax.kernels.{backend}").device_limit(device)

    yield device.kind, ["triton"] if interpret else [backend for backend in BACKENDS if serves(backend)]


def default_blocks(backend: str, shape: Shape) -> Iterator[Any]:
    module = importlib.import_module(f"biomedlm_jax.kernels.{backend}")
    yield module.default_blocks(_packed_shape(shape), "bfloat16")


def _packed_shape(shape: Shape) -> tuple[int, ...]:
    return (shape.batch, shape.seq, 3 * shape.heads, shape.head_dim)


@functools.lru_cache(maxsize=1)
def _inputs(shape: Shape) -> Any:
    """Sets of inputs, and what the first of them should give."""
    sets = [shape.inputs(seed) for seed in range(SETS)]
    return sets, timing.reference_gradients(*sets[0], shape.head_dim**-0.5)


def load_inputs(shape: Shape) -> Iterator[None]:
    """Computes what a process needs for its first candidate, in a time that is not the candidate's."""
    _inputs(shape)
    yield None


@functools.lru_cache(maxsize=1)
def _residuals(backend: str, shape: Shape, blocks: Any, interpret: bool) -> Any:
    import jax
    import jax.numpy as jnp

    module = importlib.import_module(f"biomedlm_jax.kernels.{backend}")
    scale = jnp.float32(shape.head_dim**-0.5)
    forward = jax.jit(lambda qkv: module.forward(qkv, scale, None, blocks, interpret))
    return [forward(qkv) for qkv, _ in _inputs(shape)[0]]


def _gradients(packed: Any) -> dict[str, Any]:
    import jax.numpy as jnp

    return dict(zip(("dq", "dk", "dv"), jnp.split(packed, 3, axis=2), strict=True))


def measure(
    backend: str, shape: Shape, kernel: str, base: Any, candidate: dict[str, Any], loop: Loop, interpret: bool
) -> Iterator[dict[str, Any]]:
    """Yields the candidate's errors and times.

    Args:
      base: the blocks of the other kernels; the forward pass is computed with them where the backward one is timed.
      candidate: the kernel's own, in place of those of `base`.
    """
    import jax.numpy as jnp

    module = importlib.import_module(f"biomedlm_jax.kernels.{backend}")
    blocks = dataclasses.replace(base, **candidate)
    scale = jnp.float32(shape.head_dim**-0.5)
    sets, reference = _inputs(shape)

    def forward(fixed: Any, qkv: Any) -> Any:
        return module.forward(qkv, scale, None, blocks, interpret)[0]

    def backward(fixed: Any, d_out: Any) -> Any:
        qkv, out, lse = fixed
        return module.backward(qkv, scale, None, out, lse, d_out, blocks, interpret)

    timing.fill_memory_with_nan(list(sets[0]))
    # Copies, for they are given away.
    if pass_of(kernel) == "forward":
        chain = Chain(forward, [()] * SETS, [jnp.copy(qkv) for qkv, _ in sets], loop)
    else:
        residuals = _residuals(backend, shape, base, interpret)
        fixed = [(qkv, *saved) for (qkv, _), saved in zip(sets, residuals, strict=True)]
        chain = Chain(backward, fixed, [jnp.copy(d_out) for _, d_out in sets], loop)
    result = chain.step(chain.fixed[0], chain.moving[0])
    rows = result[jnp.array(timing.reference_rows(shape.batch))]
    parts = {"out": rows} if pass_of(kernel) == "forward" else _gradients(rows)
    errors = {name: timing.relative_error(part, reference[name]) for name, part in parts.items()}
    wrong = [f"relative error of {name} is {error:.2e}" for name, error in errors.items() if not error <= MAX_ERROR]
    if not jnp.isfinite(result).all():
        wrong.append("not all of the result is written, or finite")
    if not all(timing.equal_bits(result, chain.step(chain.fixed[0], chain.moving[0])) for _ in range(RACE_CALLS)):
        wrong.append("equal calls gave different bits")
    if wrong:
        yield {"status": "wrong", "reason": "; ".join(wrong), "errors": errors}
    else:
        yield {"status": "ok", "errors": errors, **chain.time()}


# The driver.


def attempt(worker: Worker, limit_s: float, end: float, function: Any, *args: Any) -> dict[str, Any]:
    """What the generator function yields of a candidate, or why it did not.

    Args:
      end: of time.monotonic(), when no further candidate begins.
    """
    left = end - time.monotonic()
    if left <= 0:
        return {"status": "skipped", "reason": "no time was left"}
    try:
        return worker.call(function, *args, limit_s=min(limit_s, left))
    except TimedOut as error:
        return {"status": "timed out", "reason": str(error)}
    except Died as error:
        return {"status": "died", "reason": str(error)}
    except RuntimeError as error:
        return {"status": "failed", "reason": str(error)}


def winner(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The blocks of the fastest row; of the first, the default, if none is faster by `MIN_GAIN`; None if all failed."""
    timed = [row for row in rows if row["status"] == "ok"]
    if not timed:
        return None
    best = min(timed, key=lambda row: row["ms"])
    if rows[0]["status"] == "ok" and best["ms"] > (1 - MIN_GAIN) * rows[0]["ms"]:
        best = rows[0]
    return best["blocks"]


def device_name(kind: str) -> str:
    """What the kinds of one chip begin with: 'NVIDIA H100' for 'NVIDIA H100 80GB HBM3'."""
    match = re.match(r"NVIDIA [A-Z]+\d+", kind)
    return match[0] if match else kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backends", help="comma-separated; of " + ", ".join(VALUES))
    add("--shapes", help="comma-separated, each batch x seq x heads x head_dim, such as 32x1024x20x128")
    add("--kernels", help="comma-separated; of " + ", ".join(KERNELS) + "; by default those that the backend has")
    add("--out", type=Path, help="folder to write to, in place of the package and benchmarks/results")
    add("--budget-s", type=float, default=540, help="seconds after which no candidate begins")
    add("--limit-s", type=float, default=40, help="seconds that one candidate may take")
    add("--small", action="store_true", help="a tiny shape and few candidates, interpreted")
    args = parser.parse_args()
    end = time.monotonic() + args.budget_s
    shapes = timing.SMALL_SHAPES if args.small else timing.SHAPES
    if args.shapes:
        shapes = tuple(map(Shape.parse, args.shapes.split(",")))
    loop = timing.SMALL_LOOP if args.small else LOOP
    worker = Worker()
    try:
        backends, kernels = (names and names.split(",") for names in (args.backends, args.kernels))
        tune(worker, backends, kernels, shapes, loop, args.small, args.out, args.limit_s, end)
    finally:
        worker.close()


def tune(
    worker: Worker,
    backends: list[str] | None,
    kernels: list[str] | None,
    shapes: tuple[Shape, ...],
    loop: Loop,
    small: bool,
    out: Path | None,
    limit_s: float,
    end: float,
) -> None:
    kind, serving = worker.call(serving_backends, small, limit_s=limit_s)
    path = timing.report_file(out or Path(__file__).parent / "results", "tune_attention", kind)
    if out:
        block_sizes.FILE = Path(shutil.copy(block_sizes.FILE, out))
    protocol = {"sets": SETS, "calls_in_a_program": loop.calls, "programs": loop.repeats, "max_error": MAX_ERROR}
    report: dict[str, Any] = {**timing.machine(kind), "protocol": protocol, "winners": [], "rows": []}
    for backend, shape in itertools.product(backends or serving, shapes):
        blocks = worker.call(default_blocks, backend, shape, limit_s=limit_s)
        for kernel, candidates in groups(backend, blocks).items():
            if kernels and kernel not in kernels:
                continue
            rows: list[dict[str, Any]] = []
            candidates = candidates[: 2 if small else None]
            for candidate in candidates:
                attempt(worker, START_LIMIT_S, end, load_inputs, shape)  # at once, unless the process is new
                task = (measure, backend, shape, kernel, blocks, candidate, loop, small)
                row = {"backend": backend, "shape": shape._asdict(), "kernel": kernel, "blocks": candidate}
                row.update(attempt(worker, limit_s, end, *task))
                rows.append(row)
                report["rows"].append(row)
                timing.write_report(path, report)
                outcome = f"{row['ms']:.3f} ms" if "ms" in row else f"{row['status']}: {row['reason']}"
                done = f"{backend} {shape} {kernel} {len(rows)}/{len(candidates)}"
                print(done, *candidate.values(), outcome, file=sys.stderr)
            best = winner(rows)
            if best is None:
                print(f"{backend} {shape} {kernel}: no candidate was timed")
                continue
            blocks = dataclasses.replace(blocks, **best)
            entry = {
                "backend": backend,
                "device": device_name(kind),
                "head_dim": shape.head_dim,
                "dtype": "bfloat16",
                "seq": shape.seq,
                "blocks": dataclasses.asdict(blocks),
            }
            report["winners"] = [w for w in report["winners"] if {**w, "blocks": 0} != {**entry, "blocks": 0}] + [entry]
            if not small:
                block_sizes.store([entry])
            timing.write_report(path, report)
            print(f"{backend} {shape} {kernel}: {best}")


if __name__ == "__main__":
    main()
