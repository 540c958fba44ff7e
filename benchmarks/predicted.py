"""What `plan` predicts of the published run on pods of many sizes, how that is calibrated, and how true it is.

    python benchmarks/predicted.py                # the tables and the pictures of docs/scaling.md: half an hour
    python benchmarks/predicted.py --only h100    # of one device again; the others stay as they were
    python benchmarks/predicted.py --measure      # beside what the GPUs of this machine take: memory and time

All of them compile for devices that need not be here: pip install -e '.[plan]'.
"""

import argparse
import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from biomedlm_jax import config as config_lib
from biomedlm_jax import targets

ROOT = Path(__file__).parents[1]
CONFIG_FILE = ROOT / "configs" / "biomedlm_2_7b.yaml"
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "scaling.md"

# https://huggingface.co/stanford-crfm/BioMedLM: 128 A100-40GB, 6.25 days.
CARD_DAYS = 6.25

SIZES = (8, 32, 128, 512, 1024)
SLICES = {8: "2x2x2", 32: "2x4x4", 128: "4x4x8", 512: "8x8x8", 1024: "8x8x16"}
CHIPS = ("a100-40gb", "a100-80gb", "h100", "tpu-v5p")
# Copies of the model beyond so many devices: 1,024 do not divide its width of 2,560, and shards get too small.
MOST_FSDP = 128
# Sequences at once, as in the published run: they fit into 40 GB on any of these pods.
MOST_ROWS = 8

# mosaicml/llm-foundry, scripts/train/benchmarking/README.md: "3b", 2,560 x 32 layers, 20 heads, 50,368 words, nothing
# recomputed, 1,024 tokens, 8 GPUs: sequences at once, MFU.
PUBLISHED = {"a100-40gb": (10, 0.5814), "a100-80gb": (20, 0.6273), "h100": (20, 0.4620)}


def pod(chip: str, size: int) -> str:
    return f"{chip}:{SLICES[size]}" if chip.startswith("tpu") else f"{chip}:{size // 8}x8"


def configuration(size: int, **train: Any) -> config_lib.Config:
    """The published run's, with as many parts and copies as so many devices ask for."""
    config = config_lib.load_config(CONFIG_FILE)
    fsdp = min(size, MOST_FSDP)
    parts = max(1, config.train.global_batch_size // size // MOST_ROWS)
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, replica=size // fsdp, fsdp=fsdp),
        train=dataclasses.replace(config.train, **{"gradient_accumulation_steps": parts} | train),
    )


def predict(chip: str, size: int) -> dict[str, Any]:
    from biomedlm_jax.planning import compiled, drawing, report

    started = time.monotonic()
    plan = report.make_plan(compiled.compile_step(configuration(size), targets.parse(pod(chip, size))))
    seconds = time.monotonic() - started
    if (chip, size) == ("a100-40gb", 128):
        drawing.draw(plan, ROOT / "docs" / "scaling_plan.png")
    print(f"{pod(chip, size)}: {plan.mfu:.1%} MFU, {plan.days:.2f} days ({seconds:.0f} s)", file=sys.stderr, flush=True)
    return plan.as_dict() | {"planned_in_seconds": round(seconds, 1)}


def versions() -> dict[str, str]:
    import importlib.metadata

    found = {}
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def scaling(only: list[str], output: Path) -> None:
    """Predicts what is asked for, and writes it beside what was predicted before."""
    found = json.loads(output.read_text()) if output.is_file() else {"rows": [], "calibration": []}
    rows = {row["target"]: row for row in found["rows"]}
    if not only or "calibration" in only:
        found["calibration"] = calibrate()
    for chip in CHIPS:
        for size in SIZES:
            if only and chip not in only and pod(chip, size) not in only:
                continue
            rows[pod(chip, size)] = predict(chip, size)
            found |= {
                "command": "python benchmarks/predicted.py",
                "date": datetime.date.today().isoformat(),
                "versions": versions(),
                "predicted, not measured": True,
                "rows": [rows[pod(c, s)] for c in CHIPS for s in SIZES if pod(c, s) in rows],
            }
            # After each, so that what was compiled is not lost.
            output.write_text(json.dumps(found, indent=1) + "\n")
    text = DOCS.read_text()
    for name, lines in (("predicted", markdown(found)), ("calibration", calibration_table(found["calibration"]))):
        begin, end = f"<!-- {name}: by benchmarks/predicted.py -->", "<!-- end -->"
        table = "\n".join((begin, *lines, end))
        text = re.sub(rf"{re.escape(begin)}.*?{re.escape(end)}", lambda _, table=table: table, text, flags=re.DOTALL)
    DOCS.write_text(text)
    draw(found["rows"], ROOT / "docs" / "scaling.png")


def markdown(found: dict[str, Any]) -> list[str]:
    """The table of docs/scaling.md."""
    versions_ = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        "",
        "| target | replica x fsdp | sequences x parts | GB a device | step, ms | exchange, ms: hidden + exposed "
        "| binds most | MFU | days | device-hours | MWh |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        settings, phases = row["settings"], row["time"]["phases"].values()
        hidden, exposed = (sum(phase[part] for phase in phases) * 1e3 for part in ("hidden", "exposed"))
        fits = "" if row["memory"]["fits"] else " **does not fit**"
        energy = "" if row["kwh"] is None else f"{row['kwh'] / 1000:.1f}"
        lines.append(
            f"| {row['target']} | {row['mesh']['replica']} x {row['mesh']['fsdp']} "
            f"| {settings['sequences_per_device']} x {settings['gradient_accumulation_steps']} "
            f"| {row['memory']['total'] / 1e9:.1f}{fits} | {row['time']['step'] * 1e3:,.0f} "
            f"| {hidden:,.0f} + {exposed:,.0f} "
            f"| {row['time']['limit']} | {row['mfu']:.0%} | {row['days']:.2f} | {row['device_hours']:,.0f} | {energy} |"
        )
    lines += [
        "",
        f"The card's run: 128 A100-40GB, {CARD_DAYS} days, {128 * 24 * CARD_DAYS:,.0f} device-hours. Written by "
        f"`{found['command']}` on {found['date']} with {versions_}.",
        "",
    ]
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    colors = dict(zip(CHIPS, ("#0072B2", "#56B4E9", "#009E73", "#D55E00"), strict=True))
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        days, mfu = figure.subplots(1, 2)
        for chip in CHIPS:
            mine = [row for row in rows if row["target"].startswith(f"{chip}:")]
            devices = [row["devices"] for row in mine]
            options = {"color": colors[chip], "marker": "o", "label": chip}
            days.plot(devices, [row["days"] for row in mine], **options)
            mfu.plot(devices, [100 * row["mfu"] for row in mine], **options)
        days.plot(128, CARD_DAYS, marker="*", markersize=14, color="black", linestyle="none", label="the card's run")
        days.annotate(
            f"the card: 128 A100-40GB,\n{CARD_DAYS} days", (128, CARD_DAYS), (160, 9), fontsize=9, va="bottom"
        )
        days.set(xscale="log", yscale="log", xlabel="devices", ylabel="days for 300e9 tokens (predicted)")
        mfu.set(xscale="log", xlabel="devices", ylabel="MFU, % (predicted)", ylim=(0, 80))
        for axes in (days, mfu):
            axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        ticks = (0.2, 0.5, 1, 2, 5, 10, 20, 50)
        days.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        mfu.legend(frameon=False, loc="lower left")
        figure.savefig(path, dpi=150)


def calibrate() -> list[dict[str, Any]]:
    """Utilization of the published architecture beside what was published of it.

    Its matrix products are kept, so none is computed twice, as in the published runs.
    """
    from biomedlm_jax.planning import compiled, report

    found = []
    for chip, (rows, published) in PUBLISHED.items():
        config = configuration(8, global_batch_size=8 * rows, gradient_accumulation_steps=1, loss_chunk=0)
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, vocab_size=50_368, scale_attn_by_inverse_layer_idx=False)
        )
        plan = report.make_plan(compiled.compile_step(config, targets.parse(f"{chip}:1x8")))
        hidden = plan.mfu * plan.time.seconds / (plan.time.seconds - plan.time.total("exposed"))
        row = {"target": f"{chip}:1x8", "sequences": rows, "published": published, "mfu": plan.mfu, "hidden": hidden}
        print(row, file=sys.stderr, flush=True)
        found.append(row)
    return found


def calibration_table(rows: list[dict[str, Any]]) -> list[str]:
    """The table of docs/scaling.md."""
    lines = ["", "| 8 GPUs | sequences at once | MFU published | predicted | predicted, all exchange hidden |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        numbers = (f"{row[name]:.1%}" for name in ("published", "mfu", "hidden"))
        lines.append(f"| {row['target']} | {row['sequences']} | {' | '.join(numbers)} |")
    return [*lines, ""]


def measure(options: argparse.Namespace) -> None:
    """Peak memory and time of the step on this machine's GPUs, beside the plan for the same."""
    import jax

    chip = targets.chip_of(jax.devices()[0].device_kind)
    if chip is None or chip.platform != "gpu":
        sys.exit(f"nothing to measure on: {jax.devices()[0].device_kind}")
    count = jax.device_count()
    config = configuration(
        count, global_batch_size=options.rows * count, gradient_accumulation_steps=1, loss_chunk=options.loss_chunk
    )
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, remat=options.remat, unroll=options.unroll)
    )
    measured = take_steps(config, options.steps)
    command = [sys.executable, "-m", "biomedlm_jax.plan", "--config", str(CONFIG_FILE), "--json"]
    command += ["--target", f"{chip.name}:1x{count}", "--train.global_batch_size", str(options.rows * count)]
    command += ["--model.remat", options.remat, "--model.unroll", str(options.unroll)]
    command += ["--train.loss_chunk", str(options.loss_chunk)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if not result.stdout:
        sys.exit(result.stderr)
    predicted = json.loads(result.stdout)
    both = {
        "memory, GB": (predicted["memory"]["total"] / 1e9, measured["peak_bytes"] / 1e9),
        "step, ms": (predicted["time"]["step"] * 1e3, measured["seconds"] * 1e3),
        "MFU, %": (100 * predicted["mfu"], 100 * predicted["mfu"] * predicted["time"]["step"] / measured["seconds"]),
    }
    print(f"{count} x {jax.devices()[0].device_kind}: {options.rows} sequences, remat {options.remat}")
    for what, (before, after) in both.items():
        print(f"{what:12} predicted {before:8.1f}   measured {after:8.1f}   {before / after - 1:+.1%}")
    output = options.output or RESULTS / f"predicted_{chip.name}.json"
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "settings": predicted["settings"],
        "measured": measured,
        "predicted": predicted,
    }
    rows = json.loads(output.read_text())["rows"] if output.is_file() else []
    rows = [row for row in rows if row["settings"] != record["settings"]] + [record]
    output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def take_steps(config: config_lib.Config, steps: int) -> dict[str, Any]:
    """Real steps on random tokens."""
    import functools
    import statistics

    import jax
    import numpy as np

    from biomedlm_jax import sharding, step

    mesh = sharding.make_mesh(config.mesh)
    shape = (config.train.global_batch_size, config.model.n_positions)
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        init = functools.partial(step.init_state, config)
        shardings = sharding.tree_shardings(mesh, jax.eval_shape(init))
        state = jax.jit(init, out_shardings=shardings)()
        rows = sharding.batch_sharding(mesh)
        batches = [
            step.Batch(
                jax.device_put(rng.integers(0, config.model.vocab_size, shape, np.int32), rows),
                jax.device_put(np.ones(shape, bool), rows),
            )
            for _ in range(3)
        ]
        train_step = step.jit_train_step(config, shardings, rows)
        seconds = []
        for index in range(steps + 5):
            started = time.perf_counter()
            state, values = train_step(state, batches[index % 3])
            jax.block_until_ready(values)
            seconds.append(time.perf_counter() - started)
        # The first steps compile, and fill the caches of clocks and allocators.
        timed = seconds[5:]
        stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "seconds": statistics.median(timed),
        "seconds_min": min(timed),
        "seconds_max": max(timed),
        "steps": steps,
        "loss": float(values["train/loss"]),
        "peak_bytes": stats.get("peak_bytes_in_use", 0),
        "memory_stats": {name: int(value) for name, value in stats.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="take real steps on this machine's GPUs")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="CHIP", help="devices, or single targets, to plan again"
    )
    parser.add_argument("--rows", type=int, default=8, help="--measure: sequences at once on a device")
    parser.add_argument("--remat", default="matmuls", choices=("none", "matmuls", "full"), help="--measure")
    parser.add_argument("--unroll", type=int, default=1, help="--measure")
    parser.add_argument("--loss-chunk", type=int, default=256, help="--measure: 0 is all logits at once")
    parser.add_argument("--steps", type=int, default=20, help="--measure: timed steps")
    parser.add_argument("--output", type=Path, help="JSON file; by default in benchmarks/results")
    options = parser.parse_args()
    if options.measure:
        measure(options)
    else:
        scaling(options.only, options.output or RESULTS / "predicted.json")


if __name__ == "__main__":
    main()
