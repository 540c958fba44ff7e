"""Causal attention, forward and backward: ours against cuDNN, PyTorch and tokamax on this device.

    python benchmarks/attention.py                 # under ten minutes on one GPU
    python benchmarks/attention.py --small         # seconds on a CPU, with interpreted kernels: shows that it runs

Writes benchmarks/results/attention_<device>.json, after each contestant, and a chart beside it.

Each contestant runs in a process of its own, one after the other, and the first one again at the end: how far it then
is from its first times is the drift. A contestant is compared with a float32 reference before it is timed, at the
shape that is timed and at two scales, and is not timed where it fails. Times are of dependent calls in one program
(see timing.py), in three passes:

  forward   the output alone, of what the contestant takes: q, k and v, or the packed projection;
  backward  the gradients alone, from saved residuals;
  packed    output and gradient from a packed projection [batch, seq, 3 * heads, head_dim] to a gradient packed alike:
            splitting, transposing and concatenating count.

Operations are those of the causal half: 4 B H S^2 D / 2 forward, 2.5 times that backward. The machine's own ceiling
is the product of two random 8192 x 8192 bfloat16 matrices, timed likewise in the same run.

A contestant's process is killed after --limit-s seconds. With seven contestants and the first one again, that may add
up to more than --budget-s: then each gets what is left, and the last ones are recorded as skipped; half a limit is
kept for the first one's second run.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timing
from timing import MAX_ERROR, RACE_CALLS, SETS, Chain, Died, Loop, Shape, TimedOut, Worker

PASSES = ("forward", "backward", "packed")

# The first one is what the others are compared with, in errors and in time.
CONTESTANTS = ("cudnn", "ours", "torch-cudnn", "torch-flash", "ours-triton", "tokamax")
SMALL_CONTESTANTS = ("xla", "ours-triton", "torch-math")

# The smallest scale of BioMedLM 2.7B: head size 128, 32nd layer.
SMALLEST_SCALE = 1 / math.sqrt(128) / 32

MAX_ERROR_TO_CUDNN = 1.5
# In equal calls; others' backward passes may add in any order.
MUST_BE_DETERMINISTIC = ("ours", "ours-triton")


class Settings(NamedTuple):
    """Of all contestants."""

    loop: Loop
    interpret: bool
    """Runs our kernels in Pallas's interpreter."""
    matmul_size: int


FULL = Settings(timing.LOOP, interpret=False, matmul_size=8192)
SMALL = Settings(timing.SMALL_LOOP, interpret=True, matmul_size=128)


def failures(
    errors: dict[str, dict[str, float]], baseline: dict[str, dict[str, float]] | None, deterministic: bool | None
) -> list[str]:
    """What keeps a contestant from being timed.

    Args:
      errors: relative errors of out, dq, dk and dv, by scale; nan where a result holds one.
      baseline: cuDNN's, if it ran.
      deterministic: whether equal calls gave equal bits; None where they need not.
    """
    found = []
    for scale, by_name in errors.items():
        for name, error in by_name.items():
            if not error <= MAX_ERROR:
                found.append(f"relative error of {name} at scale {scale} is {error:.2e}, over {MAX_ERROR:.0e}")
            elif baseline and not error <= MAX_ERROR_TO_CUDNN * baseline[scale][name]:
                found.append(
                    f"relative error of {name} at scale {scale} is {error:.2e}, over {MAX_ERROR_TO_CUDNN} x cuDNN's "
                    f"{baseline[scale][name]:.2e}"
                )
    if deterministic is False:
        found.append(f"{RACE_CALLS} equal calls gave different bits")
    return found


# Contestants. Each is a generator that yields one result a shape and pass, and runs in its own process.


class Contestant(NamedTuple):
    """What the gate and the passes need of a contestant in JAX."""

    attend: Callable[..., Any]
    """(scale, *inputs) to the output."""
    packed: bool
    """Whether the inputs are one packed projection, not q, k and v."""

    def from_packed(self, scale: Any, qkv: Any) -> Any:
        import jax.numpy as jnp

        return self.attend(scale, *((qkv,) if self.packed else jnp.split(qkv, 3, axis=2)))

    def both(self, scale: Any, d_out: Any, qkv: Any) -> Any:
        """Output and packed gradient."""
        import jax

        out, vjp = jax.vjp(functools.partial(self.from_packed, scale), qkv)
        return out, *vjp(d_out)


def jax_contestant(name: str, interpret: bool) -> Contestant:
    import jax

    if name in ("ours", "ours-triton"):
        from biomedlm_jax.kernels.flash_attention import flash_attention

        backend = "triton" if name == "ours-triton" else None
        return Contestant(
            lambda scale, qkv: flash_attention(qkv, scale, backend=backend, interpret=interpret), packed=True
        )
    if name == "tokamax":
        import tokamax

        return Contestant(
            lambda scale, q, k, v: tokamax.dot_product_attention(
                q, k, v, scale=scale, is_causal=True, implementation="mosaic"
            ),
            packed=False,
        )
    return Contestant(
        lambda scale, q, k, v: jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation=name),
        packed=False,
    )


def run_jax(
    name: str, shapes: list[Shape], settings: Settings, baselines: dict[Shape, Any]
) -> Iterator[dict[str, Any]]:
    contestant = jax_contestant(name, settings.interpret)
    for shape in shapes:
        with_reason = functools.partial(_row, shape)
        try:
            gate = check_jax(name, contestant, shape, baselines.get(shape))
        except Exception as error:
            yield with_reason("gate", status="failed", reason=timing.one_line(error))
            continue
        yield with_reason("gate", **gate)
        if gate["status"] != "ok":
            continue
        for which in PASSES:
            try:
                chain = Chain(*jax_pass(which, contestant, shape), settings.loop)
                yield with_reason(which, status="ok", **_rates(shape, which, chain.time()))
                del chain
            except Exception as error:
                yield with_reason(which, status="failed", reason=timing.one_line(error))


def _row(shape: Shape, which: str, **rest: Any) -> dict[str, Any]:
    return {"shape": shape._asdict(), "pass": which, **rest}


def _rates(shape: Shape, which: str, times: dict[str, float]) -> dict[str, Any]:
    return {**times, "tflops": shape.operations(which) / times["ms"] / 1e9, "clocks": timing.clocks()}


def check_jax(name: str, contestant: Contestant, shape: Shape, baseline: Any) -> dict[str, Any]:
    """Compares with the reference and with itself, on new random inputs."""
    import jax
    import jax.numpy as jnp

    rows = jnp.array(timing.reference_rows(shape.batch))
    errors, deterministic = {}, True
    # Others take a number that is known when they are compiled.
    program = jax.jit(contestant.both, static_argnums=() if contestant.packed else 0)
    for label, scale in scales(shape).items():
        qkv, d_out = shape.inputs(seed=time.time_ns() % 2**32)
        reference = timing.reference_gradients(qkv, d_out, scale)
        program(scale, d_out, qkv)  # compiles
        timing.fill_memory_with_nan([d_out, qkv])
        first = program(scale, d_out, qkv)
        written = bool(jnp.isfinite(first[0]).all() & jnp.isfinite(first[1]).all())
        names = dict(zip(("dq", "dk", "dv"), jnp.split(first[1][rows], 3, axis=2), strict=True), out=first[0][rows])
        errors[label] = {
            part: timing.relative_error(names[part], reference[part]) if written else math.nan for part in reference
        }
        for _ in range(RACE_CALLS - 1):
            deterministic &= timing.equal_bits(first, program(scale, d_out, qkv))
    found = failures(errors, baseline, deterministic if name in MUST_BE_DETERMINISTIC else None)
    return _gate(errors, deterministic, found)


def _gate(errors: dict[str, dict[str, float]], deterministic: bool, found: list[str]) -> dict[str, Any]:
    verdict = {"status": "failed", "reason": "; ".join(found)} if found else {"status": "ok"}
    return {**verdict, "errors": errors, "deterministic": deterministic}


def scales(shape: Shape) -> dict[str, float]:
    return {"1/sqrt(head_dim)": 1 / math.sqrt(shape.head_dim), "1/sqrt(128)/32": SMALLEST_SCALE}


def jax_pass(which: str, contestant: Contestant, shape: Shape) -> tuple[Any, list[Any], list[Any]]:
    """What `Chain` takes: the step, and for each set its inputs that stay and the one that changes."""
    import jax
    import jax.numpy as jnp

    scale = 1 / math.sqrt(shape.head_dim)
    attend = functools.partial(contestant.attend, scale)

    def forward(fixed: Any, moving: Any) -> Any:
        return attend(moving, *fixed)

    def backward(fixed: Any, moving: Any) -> Any:
        return fixed(moving)

    @jax.jit
    def residuals(*inputs: Any) -> Any:
        return jax.vjp(attend, *inputs)[1]

    fixed, moving = [], []
    for seed in range(SETS):
        qkv, d_out = shape.inputs(seed)
        inputs = (qkv,) if contestant.packed else tuple(map(jnp.copy, jnp.split(qkv, 3, axis=2)))
        if which == "forward":
            fixed.append(inputs[1:])
            moving.append(inputs[0])
        elif which == "backward":
            fixed.append(residuals(*inputs))
            moving.append(d_out)
        else:
            fixed.append(d_out)
            moving.append(qkv)
    step = {"forward": forward, "backward": backward, "packed": functools.partial(contestant.both, scale)}[which]
    return step, fixed, moving


def run_torch(
    name: str, shapes: list[Shape], settings: Settings, baselines: dict[Shape, Any]
) -> Iterator[dict[str, Any]]:
    for shape in shapes:
        try:
            gate = check_torch(name, shape, baselines.get(shape))
        except Exception as error:
            yield _row(shape, "gate", status="failed", reason=timing.one_line(error))
            continue
        yield _row(shape, "gate", **gate)
        if gate["status"] != "ok":
            continue
        for which in PASSES:
            try:
                times = time_torch(name, which, shape, settings.loop)
                yield _row(shape, which, status="ok", **_rates(shape, which, times))
            except Exception as error:
                yield _row(shape, which, status="failed", reason=timing.one_line(error))


def _torch_attend(name: str, scale: float, q: Any, k: Any, v: Any) -> Any:
    """SDPA wants [batch, heads, seq, head_dim] and takes any strides, so turning the axes costs nothing."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {
        "torch-flash": SDPBackend.FLASH_ATTENTION,
        "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
        "torch-math": SDPBackend.MATH,
    }[name]
    with sdpa_kernel(backend):
        turned = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*turned, is_causal=True, scale=scale)
    return out.transpose(1, 2)


def _torch_both(name: str, scale: float, d_out: Any, qkv: Any) -> Any:
    import torch

    out = _torch_attend(name, scale, *qkv.chunk(3, dim=2))
    return out.detach(), *torch.autograd.grad(out, qkv, d_out)


def _torch_inputs(shape: Shape) -> tuple[Any, Any]:
    import torch

    batch, seq, heads, head_dim = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    qkv = torch.randn(batch, seq, 3 * heads, head_dim, device=device, dtype=torch.bfloat16)
    return qkv.requires_grad_(), torch.randn(batch, seq, heads, head_dim, device=device, dtype=torch.bfloat16)


def check_torch(name: str, shape: Shape, baseline: Any) -> dict[str, Any]:
    import torch

    def error(x: Any, reference: Any) -> float:
        return float((x.float() - reference).norm() / reference.norm())

    rows = timing.reference_rows(shape.batch)
    errors, deterministic = {}, True
    for label, scale in scales(shape).items():
        qkv, d_out = _torch_inputs(shape)
        references = []
        for i in rows:  # one after the other: the reference takes memory quadratic in seq
            wide = qkv[i : i + 1].detach().float().requires_grad_()
            references.append(_torch_both("torch-math", scale, d_out[i : i + 1].float(), wide))
        first = _torch_both(name, scale, d_out, qkv)
        written = all(bool(x.isfinite().all()) for x in first)
        out, gradient = (torch.cat(x) for x in zip(*references, strict=True))
        pairs = {"out": (first[0][rows], out)}
        chunks = (x.chunk(3, dim=2) for x in (first[1][rows], gradient))
        pairs.update(zip(("dq", "dk", "dv"), zip(*chunks, strict=True), strict=True))
        errors[label] = {part: error(*pair) if written else math.nan for part, pair in pairs.items()}
        for _ in range(RACE_CALLS - 1):
            again = _torch_both(name, scale, d_out, qkv)
            deterministic &= all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return _gate(errors, deterministic, failures(errors, baseline, None))


def time_torch(name: str, which: str, shape: Shape, loop: Loop) -> dict[str, float]:
    """As `Chain` does, launched call by call: the device is behind the host all the while."""
    import torch

    scale = 1 / math.sqrt(shape.head_dim)
    steps: list[Callable[[], tuple[Any, ...]]] = []
    moving = []
    for _ in range(SETS):
        qkv, d_out = _torch_inputs(shape)
        q, k, v = (x.detach().clone().requires_grad_(which == "backward") for x in qkv.chunk(3, dim=2))
        if which == "forward":
            steps.append(lambda q=q, k=k, v=v: (_torch_attend(name, scale, q, k, v),))
            moving.append(q)
        elif which == "backward":
            out = _torch_attend(name, scale, q, k, v)
            steps.append(
                lambda out=out, of=(q, k, v), d=d_out: torch.autograd.grad(out, of, d, retain_graph=True)  # type: ignore[misc]
            )
            moving.append(d_out)
        else:
            steps.append(lambda qkv=qkv, d_out=d_out: _torch_both(name, scale, d_out, qkv))
            moving.append(qkv)

    def synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def run() -> float:
        synchronize()
        begin = time.perf_counter()
        for _ in range(loop.rounds):
            for i, step in enumerate(steps):
                row = sum(x[0, 0, 0] for x in step())
                # Past autograd, which would otherwise find that a saved input has changed.
                moving[(i + 1) % SETS].data[0, 0, 0] = torch.tanh(row)
        synchronize()
        return time.perf_counter() - begin

    begin = time.perf_counter()
    run()  # warm-up
    warm_up = time.perf_counter() - begin
    return {**timing.summary([run() for _ in range(loop.repeats)], loop), "compile_s": round(warm_up, 2)}


def run_matmul(size: int, loop: Loop, dtype: str = "bfloat16") -> Iterator[dict[str, Any]]:
    """The product that says what the machine can do."""
    import jax

    def matrices(key: int) -> list[Any]:
        return [jax.random.normal(jax.random.key(key + i), (size, size), dtype) for i in range(SETS)]

    chain = Chain(lambda b, a: a @ b, matrices(0), matrices(SETS), loop)
    times = chain.time()
    yield {**times, "size": size, "tflops": 2 * size**3 / times["ms"] / 1e9, "clocks": timing.clocks()}


# The driver.


def compare(report: dict[str, Any]) -> None:
    """Fills in what follows from several contestants' rows: ratios of time, and drift."""
    rows = [row for row in report["rows"] if "ms" in row]

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return (*row["shape"].values(), row["pass"])

    first = {(row["contestant"], *key(row)): row for row in reversed(rows)}  # of two runs, the first one
    for row in rows:
        cudnn = first.get(("cudnn", *key(row)))
        row["ratio_to_cudnn"] = cudnn and cudnn["ms"] / row["ms"]
        matmul = report["matmul"].get("tflops")
        row["ratio_to_matmul"] = matmul and row["tflops"] / matmul
        if row["run"] == 2:
            row["ratio_to_first_run"] = first[(row["contestant"], *key(row))]["ms"] / row["ms"]
    report["drift"] = max((abs(r["ratio_to_first_run"] - 1) for r in rows if "ratio_to_first_run" in r), default=None)


def table(report: dict[str, Any]) -> str:
    lines = [f"{report['device']}, product of matrices {report['matmul'].get('tflops', math.nan):.0f} TFLOP/s"]
    lines.append(f"{'shape':>16} {'pass':>9} {'contestant':>12} {'ms':>8} {'+-':>6} {'TFLOP/s':>8} {'/cudnn':>7}")
    for row in sorted(report["rows"], key=lambda row: (-row["shape"]["head_dim"], row["shape"]["seq"], row["pass"])):
        shape = Shape(**row["shape"])
        if "ms" in row:
            spread = (row["ms_max"] - row["ms_min"]) / row["ms"] / 2
            ratio = row["ratio_to_cudnn"] or math.nan
            numbers = f"{row['ms']:8.3f} {spread:6.1%} {row['tflops']:8.1f} {ratio:7.2f}"
        elif row["status"] == "ok":
            continue  # a gate that was passed
        else:
            numbers = f"{row['status']}: {row.get('reason')}"
        name = row["contestant"] + (" (2)" if row["run"] == 2 else "")
        lines.append(f"{shape!s:>16} {row['pass']:>9} {name:>12} {numbers}")
    for contestant in report["contestants"]:
        if contestant["status"] != "finished":
            lines.append(f"{contestant['name']}: {contestant['status']}: {contestant['reason']}")
    if report["drift"] is not None:
        lines.append(f"drift of {report['contestants'][0]['name']} between its two runs: at most {report['drift']:.1%}")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """A bar chart of TFLOP/s by shape, one panel a pass."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if "ms" in row and row["run"] == 1]
    shapes = list(dict.fromkeys(Shape(**row["shape"]) for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure, panels = pyplot.subplots(1, len(PASSES), figsize=(15, 4.5), sharey=True, layout="constrained")
    for panel, which in zip(panels, PASSES, strict=True):
        for i, name in enumerate(names):
            found = {Shape(**r["shape"]): r["tflops"] for r in rows if r["contestant"] == name and r["pass"] == which}
            width = 0.8 / len(names)
            places = [x + width * (i - (len(names) - 1) / 2) for x in range(len(shapes))]
            panel.bar(places, [found.get(shape, 0) for shape in shapes], width, label=name)
        panel.set_xticks(range(len(shapes)), [f"S={s.seq}\nD={s.head_dim}" for s in shapes])
        panel.set_title(which)
    panels[0].set_ylabel("TFLOP/s, causal operations")
    panels[-1].legend()
    figure.suptitle(f"Causal attention, bfloat16, {report['device']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    add("--contestants", help="comma-separated; of " + ", ".join((*CONTESTANTS, "xla", "torch-math")))
    add("--shapes", help="comma-separated, each batch x seq x heads x head_dim, such as 32x1024x20x128")
    add("--budget-s", type=float, default=540, help="seconds after which nothing new begins and all is killed")
    add("--limit-s", type=float, default=75, help="seconds that one contestant's process may take")
    add("--small", action="store_true", help="tiny shapes on any machine, with interpreted kernels")
    args = parser.parse_args()
    settings = SMALL if args.small else FULL
    names = args.contestants.split(",") if args.contestants else SMALL_CONTESTANTS if args.small else CONTESTANTS
    unknown = set(names) - {*CONTESTANTS, *SMALL_CONTESTANTS}
    if unknown:
        parser.error(f"no such contestants: {', '.join(sorted(unknown))}")
    shapes = timing.SMALL_SHAPES if args.small else timing.SHAPES
    if args.shapes:
        shapes = tuple(map(Shape.parse, args.shapes.split(",")))
    report = run(names, shapes, settings, args.out, args.budget_s, args.limit_s)
    print(table(report))


def run(names: Any, shapes: Any, settings: Settings, out: Path, budget_s: float, limit_s: float) -> dict[str, Any]:
    """All contestants, the first one twice; the report, which is also written to `out`."""
    end = time.monotonic() + budget_s
    device = timing.query_gpu("name").get("name") or list(_in_new_process(timing.device_kind, limit_s=limit_s))[0]
    path = timing.report_file(out, "attention", device)
    protocol = {
        "sets": SETS,
        "calls_in_a_program": settings.loop.calls,
        "programs": settings.loop.repeats,
        "max_error": MAX_ERROR,
        "max_error_to_cudnn": MAX_ERROR_TO_CUDNN,
        "race_calls": RACE_CALLS,
    }
    report: dict[str, Any] = {
        **timing.machine(device),
        "protocol": protocol,
        "matmul": {},
        "drift": None,
        "contestants": [],
        "rows": [],
    }
    try:
        left = min(limit_s, end - time.monotonic())
        [report["matmul"]] = _in_new_process(run_matmul, settings.matmul_size, settings.loop, limit_s=left)
    except (Died, RuntimeError) as error:
        report["matmul"] = {"reason": str(error)}
    for i, name in enumerate((*names, names[0])):
        last = i == len(names)
        left = end - time.monotonic() - (0 if last else limit_s / 2)
        entry = {"name": name, "run": 2 if last else 1, "limit_s": min(limit_s, left), "clocks_before": timing.clocks()}
        begin = time.monotonic()
        if left < limit_s / 5:
            entry.update(status="skipped", reason=f"of the {budget_s:.0f} s too few were left")
        else:
            run_one = run_torch if name.startswith("torch") else run_jax
            try:
                for row in _in_new_process(
                    run_one, name, shapes, settings, _errors_of_cudnn(report), limit_s=entry["limit_s"]
                ):
                    report["rows"].append({"contestant": name, "run": entry["run"], **row})
                    print(
                        f"{time.monotonic() - begin:5.0f} s",
                        name,
                        Shape(**row["shape"]),
                        row["pass"],
                        row["status"],
                        f"{row['ms']:.3f} ms" if "ms" in row else "",
                        file=sys.stderr,
                    )
                entry["status"] = "finished"
            except (Died, RuntimeError) as error:
                entry.update(status="timed out" if isinstance(error, TimedOut) else "failed", reason=str(error))
        entry.update(seconds=round(time.monotonic() - begin, 1), clocks_after=timing.clocks())
        print(f"{entry['seconds']:5.0f} s", name, entry["status"], entry.get("reason", ""), file=sys.stderr)
        report["contestants"].append(entry)
        compare(report)
        timing.write_report(path, report)
    if any("ms" in row for row in report["rows"]):
        draw(report, path.with_suffix(".png"))
    return report


def _in_new_process(function: Callable[..., Iterator[Any]], *args: Any, limit_s: float) -> Iterator[Any]:
    worker = Worker()
    try:
        yield from worker.run(function, *args, limit_s=limit_s)
    finally:
        worker.close()


def _errors_of_cudnn(report: dict[str, Any]) -> dict[Shape, Any]:
    return {
        Shape(**row["shape"]): row["errors"]
        for row in report["rows"]
        if row["contestant"] == "cudnn" and row["run"] == 1 and row["pass"] == "gate" and row["status"] == "ok"
    }


if __name__ == "__main__":
    main()
