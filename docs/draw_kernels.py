"""Draws the pictures of docs/kernels.md: `python docs/draw_kernels.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

FOLDER = Path(__file__).parent
DPI = 110

SKIPPED, WHOLE, MASKED = "#eeeeee", "#9ecae1", "#fdae6b"
PAIRS = ["#1b9e77", "#d95f02", "#7570b3", "#e7298a"]
LOAD, PRODUCT, SOFTMAX, STORE, NEXT = "#a1d99b", "#9ecae1", "#fdd0a2", "#d9d9d9", "#f7f7f7"
READY, FREE, TURN = "#238b45", "#d94801", "#6a51a3"


def _box(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str = "") -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1.5, zorder=2))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, zorder=4)


def _square(axes: Axes, title: str, rows: int, columns: int, y: str = "queries", x: str = "keys") -> None:
    axes.set(xlim=(-0.05, columns + 0.05), ylim=(rows + 0.05, -0.05), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel(x, fontsize=8.5)
    axes.set_ylabel(y, fontsize=8.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_tiles() -> None:
    """Which blocks are skipped, and which are masked."""
    figure, grid = plt.subplots(2, 2, figsize=(9.6, 7.6), height_ratios=(2.3, 1), layout="constrained")
    _draw_pairs(grid[0, 0])
    _draw_documents(grid[0, 1])
    _draw_dq_tile(grid[1, 0])
    _draw_dkv_tile(grid[1, 1])
    names = {"skipped": SKIPPED, "whole: no mask": WHOLE, "with a mask": MASKED}
    handles = [Patch(facecolor=color, label=name) for name, color in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    figure.savefig(FOLDER / "kernels_tiles.png", dpi=DPI)


def _draw_pairs(axes: Axes) -> None:
    n, length = 8, 1000 / 128
    _square(
        axes,
        "Hopper, forward: tiles of 128, rows of 1,000.\nAt the right: blocks of each tile; pairs by colour",
        n,
        n + 1.9,
    )
    for i in range(n):
        for j in range(n):
            _box(axes, j, i, 1, 1, SKIPPED if j > i else MASKED if j == i else WHOLE)
        color = PAIRS[min(i, n - 1 - i)]
        axes.text(n + 0.15, i + 0.5, f"tile {i}: {i + 1}", va="center", fontsize=8.5, color=color, weight="bold")
    for lines in ([length, length], [0, n]), ([0, n], [length, length]):
        axes.plot(*lines, color="black", linewidth=1, linestyle="--", zorder=3)
    axes.text(7.7, 0.5, "end of the row", ha="right", va="center", fontsize=8.5)
    axes.text(7.7, 2.5, "each pair: 9 blocks", ha="right", va="center", fontsize=8.5)


def _draw_documents(axes: Axes) -> None:
    n, block, seq = 8, 128, 1000
    _square(axes, "Three documents in the row (outlined):\nwhat the Triton kernels visit, and where they mask", n, n)
    lengths = 300, 420, 280
    ends = np.cumsum(lengths)
    starts = np.repeat(ends - lengths, lengths)
    for i in range(n):
        first, last = starts[i * block], starts[min((i + 1) * block, seq) - 1]
        low = min(-(-last // block), i)  # the rule of _over_keys
        for j in range(n):
            visited = first // block <= j <= i
            _box(axes, j, i, 1, 1, SKIPPED if not visited else WHOLE if low <= j < i else MASKED)
    for end, length in zip(ends / block, np.array(lengths) / block, strict=True):
        start = end - length
        axes.plot([start, start, end, start], [start, end, end, start], color="black", linewidth=1.2, zorder=3)


def _draw_dq_tile(axes: Axes) -> None:
    _square(axes, "Hopper, dq: one tile, blocks of 64 keys,\nfrom the right to the left", 2, 6)
    for w in range(2):
        for j in range(6):
            color = SKIPPED if j > 4 + w else MASKED if j == 4 + w else WHOLE
            _box(axes, j, w, 1, 1, color, "skip" if color == SKIPPED else f"step {5 - j}")
    axes.set_yticks([0.5, 1.5], ["warp-\ngroup 0", "warp-\ngroup 1"], fontsize=8)
    axes.tick_params(length=0)
    axes.set_ylabel("")


def _draw_dkv_tile(axes: Axes) -> None:
    _square(
        axes, "Hopper, dk and dv: transposed, one tile of keys,\nblocks of 64 queries, from the left to the right", 2, 6
    )
    for w in range(2):
        for j in range(6):
            color = SKIPPED if j < w else MASKED if j == w else WHOLE
            _box(axes, j, w, 1, 1, color, "skip" if color == SKIPPED else f"step {j}")
    axes.set_yticks([0.5, 1.5], ["warp-\ngroup 0", "warp-\ngroup 1"], fontsize=8)
    axes.tick_params(length=0)
    axes.set(xlabel="queries", ylabel="")


def draw_hopper() -> None:
    """The forward kernel's timeline: a tile of three blocks, two stages, and the beginning of the next tile."""
    figure, axes = plt.subplots(figsize=(12, 6.4), layout="constrained")
    lanes = {"store 0": 7.6, "softmax 0": 6.6, "products 0": 5.6, "load": 3.8, "products 1": 2.0, "softmax 1": 1.0}
    lanes["store 1"] = 0.0
    height = 0.8

    def box(lane: str, start: float, end: float, color: str, text: str) -> None:
        _box(axes, start, lanes[lane], end - start, height, color, text)

    loads = {"q": (0, 1), "K0": (1, 2), "V0": (2, 3), "K1": (3, 4), "V1": (4, 5), "K2": (5.2, 6.2), "V2": (12.2, 13.2)}
    for name, (start, end) in loads.items():
        box("load", start, end, LOAD, name)
    for name, start in ("q'", 17), ("q'", 19.4), ("K0'", 20.4), ("V0'", 21.4):
        box("load", start, start + 1, NEXT, name)

    # Products, softmax, and the rest of each warpgroup; the tensor cores serve one product at a time.
    times = (
        {"S0": 2, "S1": 6, "PV0": 7.5, "S2": 12, "PV1": 13.5, "PV2": 18},
        {"S0": 3.5, "S1": 9, "PV0": 10.5, "S2": 15, "PV1": 16.5, "PV2": 19.5},
    )
    softmax = ({0: (3.5, 6), 1: (7.5, 10.5), 2: (13.5, 16.5)}, {0: (5, 7.5), 1: (10.5, 13.5), 2: (16.5, 19.5)})
    for w in range(2):
        for name, start in times[w].items():
            box(f"products {w}", start, start + 1.5, PRODUCT, name)
        for block, (start, end) in softmax[w].items():
            box(f"softmax {w}", start, end, SOFTMAX, f"softmax {block}")
        done = times[w]["PV2"] + 1.5
        box(f"softmax {w}", done, done + 1.5, STORE, "out / sum")
        box(f"store {w}", done + 1.5, done + 4.5, STORE, "store of the tile")
        box(f"products {w}", 22 + 1.5 * w, 23.5 + 1.5 * w, NEXT, "S0'")

    below, above = lanes["load"], lanes["load"] + height
    top, bottom = lanes["products 0"], lanes["products 1"] + height

    def arrow(x: float, y: float, to_x: float, to_y: float, color: str, label: str = "", at: float = 0.5) -> None:
        style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (to_x, to_y), (x, y), arrowprops=style, zorder=5)
        if label:
            place = x + (to_x - x) * at, y + (to_y - y) * at
            axes.text(*place, label, fontsize=7.5, color=color, ha="center", va="center", zorder=6,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip

    arrow(2, above, 2.1, top, READY, "k_ready")
    arrow(2, below, 3.5, bottom, READY, "k_ready")
    arrow(3.5, top, 5.2, above, FREE, "k_free")
    arrow(5, bottom, 5.3, below, FREE, "k_free")
    arrow(9, top, 12.2, above, FREE, "v_free")
    arrow(12, bottom, 12.4, below, FREE, "v_free")
    arrow(13.2, above, 18, top, READY, "v_ready")
    arrow(13.2, below, 19.9, bottom, READY, "v_ready")
    arrow(16.5, lanes["softmax 0"], 17, above, FREE)
    axes.text(16.35, 5.98, "q_free", fontsize=7.5, color=FREE, ha="right", va="center")
    arrow(6.2, top, 9, bottom, TURN, "turn", 0.42)
    arrow(9.3, bottom, 11.9, top, TURN, "turn", 0.2)
    arrow(12.8, top, 15, bottom, TURN, "turn", 0.25)
    arrow(19.42, lanes["softmax 1"] + height, 19.42, below, FREE)
    axes.text(19.3, 2.4, "q_free", fontsize=7.5, color=FREE, ha="right", va="center")

    axes.axhspan(below - 0.12, above + 0.12, color="#f0f0f0", zorder=0)
    labels = {
        "store 0": "stores (TMA)", "softmax 0": "softmax", "products 0": "tensor cores",
        "load": "loading warpgroup\n(TMA)",
        "products 1": "tensor cores", "softmax 1": "softmax", "store 1": "stores (TMA)",
    }  # fmt: skip
    axes.set_yticks([lanes[lane] + height / 2 for lane in labels], labels.values(), fontsize=8.5)
    for w, y in (0, 7.0), (1, 1.4):
        axes.text(-3.6, y, f"warpgroup {w}", rotation=90, va="center", ha="center", fontsize=9, weight="bold")
    axes.set(xlim=(0, 26.2), ylim=(-0.3, 8.7), xticks=[])
    axes.set_xlabel("time, not to scale", fontsize=8.5, loc="right")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.savefig(FOLDER / "kernels_hopper.png", dpi=DPI)


def draw_tpu() -> None:
    """The order in which pairs of blocks are visited, and after which of them something is written."""
    figure, (forward, backward) = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    n = 5
    _square(forward, "TPU, forward: pairs by block of queries", n + 0.7, n + 1.3)
    _square(backward, "TPU, backward: pairs by block of keys", n + 0.7, n + 1.3)
    visits = [(i, j) for i in range(n) for j in range(i + 1)]
    for axes, order in (forward, visits), (backward, sorted(visits, key=lambda pair: pair[::-1])):
        for i in range(n):
            for j in range(n):
                text = str(order.index((i, j)) + 1) if j <= i else ""
                _box(axes, j, i, 1, 1, SKIPPED if j > i else MASKED if j == i else WHOLE, text)
    for i in range(n):
        forward.text(n + 0.1, i + 0.5, f"out, lse {i}", va="center", fontsize=8.5)
        backward.text(n + 0.1, i + 0.5, f"dq {i} after {1 + sum(n - k for k in range(i))}", va="center", fontsize=8.5)
        backward.text(i + 0.5, n + 0.35, f"dk, dv {i}", ha="center", va="center", fontsize=8.5)
    figure.savefig(FOLDER / "kernels_tpu.png", dpi=DPI)


if __name__ == "__main__":
    draw_tiles()
    draw_hopper()
    draw_tpu()
