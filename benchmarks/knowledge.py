"""Does a model answer questions about what it read? From documents to answers, by the commands that users have.

    python benchmarks/knowledge.py    # 18 to 30 minutes on two CPU cores

Writes benchmarks/results/knowledge_cpu.json and a chart beside it. The bundled corpus invents drugs, each of use in one
disease. A small model is pretrained on the openings (title and first sentence) of trial reports about some of the
drugs, `train`; it is exported to PyTorch's format, `convert to-hf`; the export is fine-tuned, by LoRA, on four-choice
questions about most of these drugs, `finetune`; and it answers questions about others, `evaluate --task`:

- held out: drugs that it read about, of which no question was among those that it was fine-tuned on. What it answers it
  can know from its reading only. Yet others, `dev`, choose the checkpoint.
- unread: drugs that no document named. It can but guess: one in four.

Only openings, because the verdict that follows from a fact (of use, or not) is a larger part of them, so that the
model learns in minutes to compare what it reads with what it knows.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import timing

from biomedlm_jax import synthetic

# In the words of what was read: a hundred facts are few to learn other words from.
QUESTIONS = (
    "{Drug} in the treatment of",
    "{Drug} in patients with",
    "Efficacy of {drug} compared with placebo in",
    "Clinical effects of {drug} in",
    "A multicenter trial of {drug} in adults with",
)
CHOICES = 4
RESULTS = Path(__file__).parent / "results"


class Settings(NamedTuple):
    drugs: int = 144
    steps: int = 8000
    epochs: int = 4
    documents: int = 200_000
    questions: int = 20
    """Asked about a drug."""
    seed: int = 0


# The least that learns to compare; for tests/test_knowledge.py.
SMALL = Settings(drugs=48, steps=3000, epochs=10)

PRETRAINING = {
    "model": {"vocab_size": 768, "n_positions": 64, "n_embd": 64, "n_layer": 4, "n_head": 2, "unroll": 4},
    "data": {"source": "pile", "pile_sets": [], "document_attention": True},
    "optimizer": {"learning_rate": 4e-3, "weight_decay": 1e-4, "warmup_steps": 100},
    "train": {"global_batch_size": 64, "log_every": 50, "eval_every": 500, "checkpoint_every": 500},
}
FINETUNING = {
    "task": {"name": "medmcqa", "max_length": 64},
    "model": {"embd_pdrop": 0.05, "attn_pdrop": 0.0, "resid_pdrop": 0.05, "compute_dtype": "float32", "unroll": 4},
    "lora": {"rank": 4},
    "optimizer": {"learning_rate": 1e-3, "warmup_fraction": 0.1},
    "train": {"global_batch_size": 32, "log_every": 20, "eval_every": 20},
}


def split(settings: Settings) -> dict[str, list[synthetic.Drug]]:
    """Drugs by what the model gets to know of them; the unread ones are of use in diseases that are read about."""
    world = synthetic.knowledge_base()
    read, others = list(world.drugs[: settings.drugs]), world.drugs[settings.drugs :]
    diseases = {drug.indication for drug in read}
    random.Random(settings.seed).shuffle(read)
    tuned, dev = len(read) * 2 // 3, len(read) * 7 // 9
    return {
        "fine-tuned": read[:tuned],
        "dev": read[tuned:dev],
        "held out": read[dev:],
        "unread": [drug for drug in others if drug.indication in diseases],
    }


def documents(settings: Settings, drugs: Sequence[synthetic.Drug]) -> dict[str, list[str]]:
    """Openings of trial reports about some drugs, to be trained on and held out."""
    world = synthetic.KnowledgeBase(
        tuple(drugs),
        tuple(dict.fromkeys(drug.target for drug in drugs)),
        tuple(dict.fromkeys(drug.indication for drug in drugs)),
    )
    texts = []
    for index in range(settings.documents):
        title, abstract = synthetic.generate(index, settings.seed, world, ["trial"]).text.split("\n")
        texts.append(f"{title}\n{abstract.partition('. ')[0]}.")
    return {"train": texts[2000:], "eval": texts[:2000]}


def questions(settings: Settings, drugs: Sequence[synthetic.Drug], diseases: Sequence[str]) -> list[dict[str, Any]]:
    """MedMCQA's records: which disease a drug is of use in, among four that are read about."""
    rng = random.Random(settings.seed + 1)
    records = []
    for drug in drugs:
        right = drug.indication.name
        for number in range(settings.questions):
            choices = [right, *rng.sample([name for name in diseases if name != right], CHOICES - 1)]
            rng.shuffle(choices)
            records.append(
                {
                    "id": f"{drug.name} {number}",
                    "question": rng.choice(QUESTIONS).format(drug=drug.name, Drug=drug.name.capitalize()),
                    **dict(zip(("opa", "opb", "opc", "opd"), choices, strict=True)),
                    "cop": choices.index(right) + 1,
                }
            )
    return records


def write_lines(path: Path, records: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_config(path: Path, settings: dict[str, dict[str, Any]], **more: dict[str, Any]) -> str:
    """Settings by group, and more of some groups; in JSON, which is YAML."""
    path.write_text(
        json.dumps({group: settings.get(group, {}) | more.get(group, {}) for group in {**settings, **more}})
    )
    return str(path)


def command(name: str, *args: str) -> None:
    line = [sys.executable, "-m", f"biomedlm_jax.{name}", *args]
    print("$ python", *line[1:], flush=True)
    subprocess.run(line, check=True)


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """The results of `evaluate` on each group of drugs; goes on with what is in the folder.

    Raises:
      subprocess.CalledProcessError: a command failed; it said why.
    """
    groups = split(settings)
    read = groups["fine-tuned"] + groups["dev"] + groups["held out"]
    diseases = sorted({drug.indication.name for drug in read})

    texts = {
        part: write_lines(folder / f"{part}.jsonl", [{"text": text} for text in part_texts])
        for part, part_texts in documents(settings, read).items()
    }
    config = write_config(
        folder / "pretraining.json",
        PRETRAINING,
        data={"train_files": texts["train"], "eval_files": texts["eval"]},
        train={"steps": settings.steps},
        run={"dir": str(folder / "pretrained")},
    )
    command("train", "--config", config)
    if not (folder / "exported").exists():
        command("convert", "to-hf", "--checkpoint", str(folder / "pretrained"), "--output", str(folder / "exported"))

    files = {
        group: write_lines(folder / f"{group.replace(' ', '_')}.json", questions(settings, drugs, diseases))
        for group, drugs in groups.items()
    }
    config = write_config(
        folder / "finetuning.json",
        FINETUNING,
        task={"train_files": files["fine-tuned"], "eval_files": files["dev"]},
        train={"epochs": settings.epochs},
        run={"dir": str(folder / "finetuned"), "init_from": str(folder / "exported")},
    )
    command("finetune", "--config", config)

    results = {}
    for group, file in files.items():
        output = folder / f"answers {group}"
        args = ("--checkpoint", str(folder / "finetuned"), "--task", "medmcqa", "--data", file, "--output", str(output))
        command("evaluate", *args)
        results[group] = by_drug(output / "predictions.jsonl")
    return {"groups": results}


def by_drug(predictions: Path) -> dict[str, Any]:
    """Accuracy with an interval over drugs, as the questions about one are answered alike."""
    right: dict[str, list[bool]] = {}
    for line in map(json.loads, predictions.read_text().splitlines()):
        right.setdefault(line["id"].split()[0], []).append(line["prediction"] == line["gold"])
    of_drugs = np.array([np.mean(answers) for answers in right.values()])
    interval = scipy.stats.bootstrap((of_drugs,), np.mean, method="percentile", random_state=0).confidence_interval
    return {
        "drugs": len(right),
        "questions": sum(map(len, right.values())),
        "accuracy": float(of_drugs.mean()),
        "accuracy_95": list(interval),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", help="where everything stays, and a run that was stopped goes on; by default temporary"
    )
    parser.add_argument("--output", help="the file of results")
    args = parser.parse_args()
    settings = Settings()
    report = timing.machine("cpu") | {"settings": settings._asdict()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report |= run(settings, folder)
    for group, found in report["groups"].items():
        low, high = found["accuracy_95"]
        print(
            f"{group:12}{found['drugs']:4} drugs{found['questions']:6,} questions{found['accuracy']:8.1%} right "
            f"({low:.1%} to {high:.1%})"
        )
    output = Path(args.output) if args.output else timing.report_file(RESULTS, "knowledge", "cpu")
    timing.write_report(output, report)
    draw(report["groups"], output.with_suffix(".png"))


def draw(groups: dict[str, Any], path: Path) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6, 2.5), layout="constrained")
    axes = figure.subplots()
    accuracy = [found["accuracy"] for found in groups.values()]
    ends = [found["accuracy_95"] for found in groups.values()]
    errors = [
        [a - low for a, (low, _) in zip(accuracy, ends, strict=True)],
        [h - a for a, (_, h) in zip(accuracy, ends, strict=True)],
    ]
    axes.barh(list(groups), accuracy, xerr=errors, color=["tab:gray", "tab:gray", "tab:blue", "tab:orange"], capsize=3)
    axes.axvline(1 / CHOICES, linestyle=":", color="black", label="chance")
    axes.set(xlim=(0, 1), xlabel="questions answered right, with 95 % intervals")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
