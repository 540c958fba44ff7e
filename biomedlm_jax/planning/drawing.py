"""Draws a plan: what fills a device's memory, and what it does during a step."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from biomedlm_jax.planning import memory
from biomedlm_jax.planning.flops import PHASES
from biomedlm_jax.planning.report import GB, Plan, sequences_per_device
from biomedlm_jax.planning.roofline import EXCHANGE_KINDS

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_MEMORY_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999", "#DDDDDD")
_COMPUTE_COLORS = {"products": "#0072B2", "memory-bound operations": "#56B4E9", "optimizer": "#009E73"}
# Exposed, and the same paler where something is computed beside it.
_EXCHANGE_COLORS = {"gather": ("#E69F00", "#F8E1B0"), "reduce": ("#D55E00", "#F5CDB3"), "other": ("#666666", "#CCCCCC")}


def draw(plan: Plan, path: str | Path) -> None:
    """Writes the picture as PNG."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 6.2), layout="constrained")
        top, bottom = figure.subplots(2, 1, height_ratios=(1, 1.7))
        compiled, model = plan.compiled, plan.compiled.run.model
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
    if shown := len(axes.get_legend_handles_labels()[0]):
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.42),
            ncols=shown if shown <= 5 else 4,
            frameon=False,
            columnspacing=1.5,
        )


def _draw_time(axes: Any, plan: Plan) -> None:
    """Part by part what is computed; above it the exchange, beside it where it is hidden, after it where it is not."""
    left, total = 0.0, plan.time.seconds * 1e3
    rows = {"compute": 0.0} | {
        kind: place + 1.0
        for place, kind in enumerate(
            kind for kind in EXCHANGE_KINDS if any(sum(phase.kinds[kind]) > 0 for phase in plan.time.phases.values())
        )
    }
    for name in PHASES:
        phase, start = plan.time.phases[name], left
        parts = (("products", phase.products), ("memory-bound operations", phase.memory))
        for part, seconds in parts:
            color = _COMPUTE_COLORS["optimizer" if name == "optimizer" else part]
            axes.barh(0, seconds * 1e3, left=left, height=0.75, color=color)
            left += seconds * 1e3
        beside = start
        for kind, (hidden, exposed) in phase.kinds.items():
            strong, pale = _EXCHANGE_COLORS[kind]
            if hidden + exposed > 0:
                axes.barh(rows[kind], hidden * 1e3, left=beside, height=0.75, color=pale)
                axes.barh(rows[kind], exposed * 1e3, left=left, height=0.75, color=strong)
            beside, left = beside + hidden * 1e3, left + exposed * 1e3
        if left - start > 0.1 * total:
            axes.text((start + left) / 2, len(rows) - 0.1, f"{name} {left - start:,.0f} ms", ha="center", va="center")
        axes.axvline(left, color="black", linewidth=0.5, linestyle=":")
    colors = _COMPUTE_COLORS | {f"{kind}, exposed": _EXCHANGE_COLORS[kind][0] for kind in rows if kind != "compute"}
    colors |= {f"{kind}, hidden": _EXCHANGE_COLORS[kind][1] for kind in rows if kind != "compute"}
    for label, color in colors.items():
        axes.barh(0, 0, color=color, label=label)
    axes.set(
        xlim=(0, total * 1.01),
        ylim=(-0.5, len(rows) + 0.3),
        xlabel=f"a step, ms (predicted): {total:,.0f} ms, {plan.mfu:.1%} MFU; what binds most: {plan.time.limit}",
    )
    axes.set_yticks(list(rows.values()), list(rows))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=5, frameon=False, columnspacing=1.5)
