"""Command: what a run learnt, as a picture and in a few lines.

python -m biomedlm_jax.report RUN
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from etils import epy

from biomedlm_jax.errors import UserError, run_command

with epy.lazy_imports():
    import matplotlib.figure

    from biomedlm_jax import metrics


def main() -> None:
    """Draws RUN/report.png and prints the numbers that it shows."""
    parser = argparse.ArgumentParser(
        prog="python -m biomedlm_jax.report", description="Draw the curves of a run, and print its numbers."
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", metavar="FILE", help="picture to write (default: RUN/report.png)")
    args = parser.parse_args()
    lines = metrics.read_metrics(args.run)
    trained = [line for line in lines if "train/loss" in line]
    if not trained:
        raise UserError(f"{args.run} has no logged steps yet")
    output = Path(args.output or Path(args.run) / "report.png")
    print(summary(lines))
    draw(lines, Path(args.run).resolve().name, output)
    print(f"drawn in {output}")


def summary(lines: list[dict[str, Any]]) -> str:
    """The numbers of a run's first, best and last moments, as a small table."""
    trained = [line for line in lines if "train/loss" in line]
    evaluated = [line for line in lines if "eval/loss" in line]
    # Of answers by a head, a fine-tuned model's.
    answers = any("eval/accuracy" in line for line in evaluated)
    text = [f"{'':16}{'step':>10}{'loss':>10}{'accuracy' if answers else 'perplexity':>12}"]

    def row(label: str, line: dict[str, Any], key: str) -> None:
        perplexity = f"{metrics.perplexity(line[key]):>12.2f}"
        accuracy = f"{line['eval/accuracy']:>12.1%}" if "eval/accuracy" in line else ""
        text.append(f"{label:16}{line['step']:>10,}{line[key]:>10.4f}{accuracy if answers else perplexity}")

    row("training, first", trained[0], "train/loss")
    row("training, last", trained[-1], "train/loss")
    if evaluated:
        row("held out, first", evaluated[0], "eval/loss")
        best = min(evaluated, key=lambda line: (-line.get("eval/accuracy", 0), line["eval/loss"]))
        row("held out, best", best, "eval/loss")
        row("held out, last", evaluated[-1], "eval/loss")
    last = trained[-1]
    what = "tokens" if "tokens" in last else "examples"
    done = f"{last['tokens']:,} tokens" if what == "tokens" else f"{last['epoch']:.1f} epochs"
    rates = [line[key] for line in trained if line.get(key := f"perf/{what}_per_second")]
    if rates:
        done += f", median {statistics.median_high(rates):,.{0 if what == 'tokens' else 1}f} {what}/s"
    text.append(done)
    return "\n".join(text)


def draw(lines: list[dict[str, Any]], title: str, output: Path) -> None:
    """Writes a picture of the loss, the learning rate, the gradient's norm, and throughput or accuracy by step."""
    answers = any("eval/accuracy" in line for line in lines)
    panels: tuple[tuple[str, dict[str, str | None], str], ...] = (
        (
            "loss, nats a question" if answers else "loss, nats a token",
            {"train/loss": "training", "eval/loss": "held out"},
            "log",
        ),
        ("gradient norm, before clipping", {"train/grad_norm": None}, "log"),
        ("learning rate", {"train/learning_rate": None}, "linear"),
        ("accuracy on the dev set", {"eval/accuracy": None}, "linear")
        if answers
        else ("tokens per second", {"perf/tokens_per_second": None}, "linear"),
    )
    figure = matplotlib.figure.Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    for axes, (label, series, scale) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for key, name in series.items():
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            held_out = key.startswith("eval/")
            axes.plot(
                *zip(*points, strict=True) if points else ((), ()),
                label=name,
                linewidth=1.8 if held_out else 0.9,
                marker="o" if held_out else None,
                markersize=3,
            )
        axes.set(title=label, xlabel="step", yscale=scale)
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
    try:
        figure.savefig(output, dpi=110)
    except ValueError as error:  # a format that matplotlib does not know
        raise UserError(f"{output}: {error}") from error


if __name__ == "__main__":
    run_command(main)
