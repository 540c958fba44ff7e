"""What fine-tuning the published model takes of one GPU's memory, as compiled for GPUs that need not be here.

    python benchmarks/finetune_memory.py       # the table of docs/finetuning.md, a quarter of an hour on two cores

Needs the compilers: pip install -e '.[plan]'. What fits on which GPU: at most 90 % of its memory, as `plan` counts.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "finetune_memory.json"

# Ampere's kernels need least shared memory, which GPUs of 24 GB have little of.
TARGET = "a100-80gb:1x1"
LORA = ["--lora.rank", "16"]
# A question is four rows, of 512 tokens with the longest choices; no dropout of probabilities, so that flash serves.
CASES: dict[str, list[str]] = {
    "one question, all weights": ["--task.name", "medqa"],
    "one question, LoRA": ["--task.name", "medqa", *LORA],
    "one text of 512, all weights": ["--task.name", "pubmedqa"],
    "one text of 512, LoRA": ["--task.name", "pubmedqa", *LORA],
    "one pair of 1,024, all weights": ["--task.name", "generation", "--train.loss_chunk", "128"],
    "one pair of 1,024, LoRA": ["--task.name", "generation", "--train.loss_chunk", "128", *LORA],
}
REMAT = ("none", "matmuls", "full")
# Sizes as makers print them, in GB, and the bytes that nvidia-smi shows of such GPUs.
CARDS = {"24": 24_564 << 20, "40": 40_960 << 20, "80": 81_920 << 20, "141": 143_771 << 20}


def plan(options: list[str]) -> dict[str, Any]:
    """The plan of one example at once, in two parts, so that gradients are summed as they would be."""
    command = [
        *(sys.executable, "-m", "biomedlm_jax.plan", "--target", TARGET, "--json", "--model.attn_pdrop", "0"),
        *("--train.global_batch_size", "2", "--train.gradient_accumulation_steps", "2"),
        *options,
    ]
    # It ends with 1 if the step does not fit.
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False
    )
    if not done.stdout:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.parse_args()
    import jax

    rows = []
    for case, options in CASES.items():
        for remat in REMAT:
            found = plan([*options, "--model.remat", remat])
            rows.append({"case": case, "remat": remat, "options": options, "memory": found["memory"]})
            print(f"{case:32} {remat:8} {found['memory']['total'] / 1e9:6.1f} GB", flush=True)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    results = {
        "command": "python benchmarks/finetune_memory.py",
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "target": TARGET,
        "cards": CARDS,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(rows)))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: what is recomputed least on each card, and what it needs."""
    sizes = list(CARDS)
    lines = ["| at once | " + " | ".join(f"{size} GB" for size in sizes) + " |", "|---|" + "---|" * len(sizes)]
    for case in CASES:
        cells = []
        for size in sizes:
            fits = [row for row in rows if row["case"] == case and row["memory"]["total"] <= 0.9 * CARDS[size]]
            cells.append(f"{fits[0]['memory']['total'] / 1e9:.1f} GB, `{fits[0]['remat']}`" if fits else "no")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
