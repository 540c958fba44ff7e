"""What FP8 does to the loss: the same training in bfloat16 with and without `model.fp8`.

    python benchmarks/fp8.py                 # a quarter of an hour on two CPU cores

Writes benchmarks/results/fp8_<device>.json, after each run, and a chart beside it.

A GPT-2 of 4 layers learns the bundled synthetic abstracts (configs/quickstart.yaml, twice as wide) for --steps steps
from the same initial weights on the same batches. What a difference is worth shows in the other runs: bfloat16 from
other initial weights, on the same batches, and float32. The loss on held-out text is computed in bfloat16 after all of
them, as a model is used (of the run in float32 in float32).

On a CPU the products are emulated: of operands rounded to FP8, summed in float32. Losses are what they would be on a
GPU, but for the order of sums; the time says nothing.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import timing

from biomedlm_jax import config as config_lib
from biomedlm_jax import data, mixture, preparation, sharding, step
from biomedlm_jax import model as model_lib

CONFIG_FILE = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


class Run(NamedTuple):
    """What differs from the others."""

    name: str
    compute_dtype: str = "bfloat16"
    fp8: bool = False
    seed: int = 0
    """Of the initial weights."""


BASE = Run("bfloat16")
RUNS = (
    BASE,
    Run("bfloat16 with fp8", fp8=True),
    Run("bfloat16, other weights: 1", seed=1),
    Run("bfloat16, other weights: 2", seed=2),
    Run("float32", compute_dtype="float32"),
)


def configuration(steps: int, width: int, folder: str) -> Any:
    """The quickstart's, on one device, with its rate's whole course in so many steps."""
    config = config_lib.load_config(CONFIG_FILE)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, n_embd=width),
        train=dataclasses.replace(config.train, steps=steps),
        run=dataclasses.replace(config.run, dir=folder),
    )


def train(config: Any, run: Run) -> dict[str, Any]:
    """The loss of each step, and at the end on held-out text, in nats a token."""
    model = dataclasses.replace(config.model, compute_dtype=run.compute_dtype, fp8=run.fp8)
    config = dataclasses.replace(config, model=model)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    rows, size, steps = sharding.batch_sharding(mesh), config.train.global_batch_size, config.train.steps
    with jax.set_mesh(mesh):
        state = step.init_state(config, model_lib.init_params(model, run.seed))
        shardings = sharding.tree_shardings(mesh, state)
        jitted = step.jit_train_step(config, shardings, rows)
        batches = data.train_batches(
            mixture.open_train(config), config.train.seed, size, 0, steps, rows, config.data.reader_threads
        )
        state, losses = jax.device_put(state, shardings), []
        begin = time.perf_counter()
        for batch in batches:
            state, values = jitted(state, batch)
            losses.append(float(values["train/loss"]))
            if len(losses) % 50 == 0:
                print(f"{run.name}: step {len(losses)}, loss {losses[-1]:.4f}", file=sys.stderr, flush=True)
        seconds = time.perf_counter() - begin
        evaluate = step.jit_eval_step(config_lib.as_used(config), mesh)
        nll = tokens = 0.0
        for held_out in mixture.open_held_out(config).values():
            found = step.held_out_loss(evaluate, state.params, data.eval_batches(held_out, size, rows))
            nll, tokens = nll + found[0], tokens + found[1]
    return {**run._asdict(), "losses": losses, "eval_loss": nll / tokens, "seconds": round(seconds, 1)}


def derive(report: dict[str, Any]) -> None:
    """Fills in the differences from the first run: of the mean loss of the last 50 steps, and on held-out text."""
    base = report["rows"][0]
    for row in report["rows"]:
        row["last_50"] = float(np.mean(row["losses"][-50:]))
        row["last_50_minus_bfloat16"] = row["last_50"] - base["last_50"]
        row["eval_minus_bfloat16"] = row["eval_loss"] - base["eval_loss"]
        difference = np.abs(np.subtract(row["losses"], base["losses"]))
        row["largest_difference_of_a_step"] = float(difference.max())


def table(report: dict[str, Any]) -> str:
    lines = [f"{'':28} last 50 steps  (difference)  held out  (difference)"]
    for row in report["rows"]:
        lines.append(
            f"{row['name']:28} {row['last_50']:13.4f}  ({row['last_50_minus_bfloat16']:+10.4f})  "
            f"{row['eval_loss']:8.4f}  ({row['eval_minus_bfloat16']:+10.4f})"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path, window: int = 10) -> None:
    """Losses, and below their differences from bfloat16's, as means of some steps."""
    from matplotlib.figure import Figure

    colors = dict(zip((run.name for run in RUNS), ("#000000", "#D55E00", "#BBBBBB", "#999999", "#0072B2"), strict=True))
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    base = np.array(report["rows"][0]["losses"])
    smooth = functools.partial(np.convolve, np.full(window, 1 / window), mode="valid")
    for row in report["rows"]:
        losses, color = np.array(row["losses"]), colors[row["name"]]
        dashed = "--" if row["fp8"] else "-"
        above.plot(np.arange(1, len(losses) + 1), losses, dashed, color=color, label=row["name"], linewidth=1)
        if row is not report["rows"][0]:
            below.plot(np.arange(window, len(losses) + 1), smooth(losses - base), color=color, linewidth=1)
    below.axhline(0, color="#000000", linewidth=0.8)
    above.set(ylabel="loss, nats a token", title=f"Training in bfloat16 with and without FP8 ({report['device']})")
    below.set(xlabel="step", ylabel=f"minus bfloat16's,\nmean of {window} steps")
    above.legend(frameon=False)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    add("--steps", type=int, default=300, help="of each run")
    add("--width", type=int, default=256, help="model.n_embd")
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    path = timing.report_file(args.out, "fp8", device)
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(args.steps, args.width, folder)
        preparation.ensure_prepared(config)
        settings = {name: dataclasses.asdict(getattr(config, name)) for name in ("model", "data", "optimizer", "train")}
        report: dict[str, Any] = {**timing.machine(device), "settings": settings, "rows": []}
        for run in RUNS:
            report["rows"].append(train(config, run))
            derive(report)
            timing.write_report(path, report)
    print(table(report))
    draw(report, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
