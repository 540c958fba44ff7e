"""Draws a plan: what fills a device's memory, and what it does during a step."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from biomedlm_jax.planning import memory
from biomedlm_jax.planning.flops import PHASES
from biomedlm_jax.planning.report import GB, Plan, sequences_per_device

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_MEMORY_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999", "#DDDDDD")
_COLORS = {"products": "#0072B2", "memory": "#56B4E9", "optimizer": "#009E73", "exchange": "#D55E00"}
_HIDDEN = "#F3C29B"


def draw(plan: Plan, path: str | Path) -> None:
    """Writes the picture as PNG."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, height_ratios=(1, 1.25))
        compiled, model = plan.compiled, plan.compiled.config.model
        figure.suptitle(
            f"{compiled.target}: {sequences_per_device(compiled)} x {model.n_positions:,} tokens at once on a device, "
            f"remat {model.remat}",
            fontsize=12,
            fontweight="bold",
            x=0.01,
            ha="left",
        )
        _draw_memory(top, plan)
        _draw_time(bottom, plan)
        figure.savefig(path, dpi=150)


def _draw_memory(axes: Any, plan: Plan) -> None:
    left, limit, capacity = 0.0, plan.memory_limit / GB, plan.compiled.target.chip.memory / GB
    total = plan.compiled.memory_bytes / GB
    for part, color in zip(memory.PARTS, _MEMORY_COLORS, strict=True):
        size = plan.compiled.memory[part] / GB
        if size < 0.001 * capacity:
            left += size
            continue
        axes.barh(0, size, left=left, color=color, edgecolor="white", linewidth=0.5, label=f"{part} {size:.1f}")
        left += size
    axes.axvline(limit, color="black", linewidth=1.5)
    axes.axvspan(limit, max(capacity, limit * 1.005), color="black", alpha=0.12, linewidth=0)
    right = max(capacity, total) * 1.02
    ha, shift = ("right", -0.005) if limit > 0.5 * right else ("left", 0.005)
    axes.text(limit + shift * right, 0.62, f"limit {limit:.1f} GB", ha=ha, va="bottom")
    axes.text(total + 0.005 * right, 0, f"{total:.1f} GB", va="center", ha="left", fontweight="bold")
    axes.set(xlim=(0, right), ylim=(-0.5, 0.95), yticks=[], xlabel="memory of a device, GB (compiled)")
    axes.spines["left"].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.42), ncols=4, frameon=False, columnspacing=1.5)


def _draw_time(axes: Any, plan: Plan) -> None:
    """One bar of what is computed, above it the exchange: beside it where it is hidden, alone where it is not."""
    left = 0.0
    for name in PHASES:
        phase = plan.time.phases[name]
        start = left
        busy = phase.products + phase.memory
        for part in ("products", "memory"):
            seconds = getattr(phase, part) * 1e3
            axes.barh(0, seconds, left=left, height=0.7, color=_COLORS["optimizer" if name == "optimizer" else part])
            left += seconds
        axes.barh(1, phase.hidden * 1e3, left=start, height=0.7, color=_HIDDEN)
        axes.barh(1, phase.exposed * 1e3, left=start + busy * 1e3, height=0.7, color=_COLORS["exchange"])
        left += phase.exposed * 1e3
        if left - start > 0.04 * plan.time.seconds * 1e3:
            axes.text((start + left) / 2, 1.75, f"{name}\n{left - start:,.0f} ms", ha="center", va="center")
        axes.axvline(left, ymax=0.9, color="black", linewidth=0.5, linestyle=":")
    labels = {
        "products": _COLORS["products"],
        "memory-bound operations": _COLORS["memory"],
        "optimizer": _COLORS["optimizer"],
        "exchange, hidden": _HIDDEN,
        "exchange, exposed": _COLORS["exchange"],
    }
    for label, color in labels.items():
        axes.barh(0, 0, color=color, label=label)
    axes.set(
        xlim=(0, left * 1.01),
        ylim=(-0.5, 2.2),
        yticks=[0, 1],
        yticklabels=["compute", "exchange"],
        xlabel=f"a step, ms (predicted): {left:,.0f} ms, {plan.mfu:.1%} MFU; what binds most: {plan.time.limit}",
    )
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=5, frameon=False, columnspacing=1.5)
