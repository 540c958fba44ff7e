"""How well a model answers the questions of a downstream task: by its head, by likelihood, or in its own words."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from biomedlm_jax import adaptation, decoding, encoding, generation, heads, likelihood, load, scoring, sharding
from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError
from biomedlm_jax.files import replace_file
from biomedlm_jax.finetune_config import MULTIPLE_CHOICE, FinetuneConfig, Name
from biomedlm_jax.generation_config import GenerationConfig
from biomedlm_jax.likelihood import Choices
from biomedlm_jax.tasks import LETTERS, TASKS, Example, Generation, MultipleChoice

logger = logging.getLogger(__name__)

# Inside the folder of the model: a folder for each task, with these.
FOLDER = "evaluations"
PREDICTIONS_FILE, RESULTS_FILE, PICTURE_FILE = "predictions.jsonl", "results.json", "calibration.png"

# How BioMedLM's code writes texts: https://github.com/stanford-crfm/BioMedLM/tree/main/finetune/textgen
TEXT_GENERATION = GenerationConfig(num_beams=5, no_repeat_ngram_size=6, length_penalty=-0.5)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Predictions, a JSON object for each example, and what they add up to."""

    predictions: list[dict[str, Any]]
    results: dict[str, Any]
    calibration: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    """Of answers that are known, as `scoring.calibration` returns it."""


@dataclasses.dataclass(frozen=True)
class Shots:
    """Examples with their answers that a base model is shown before each question."""

    examples: Sequence[Example] = ()
    choices: Choices = "texts"
    rule: str = "length"


def evaluate(
    path: str | Path,
    name: Name,
    files: Sequence[str],
    *,
    step: int | None = None,
    batch_size: int = 8,
    shots: Shots | None = None,
    new_tokens: int | None = None,
) -> Evaluation:
    """Answers all examples of a task.

    Args:
      path: the folder of a run, or a Hugging Face folder.
      name: of the task.
      files: the task's files or globs.
      step: which checkpoint of a run; by default the newest, of fine-tuning the best.
      batch_size: rows at once and device.
      shots: how a model without a head is asked.
      new_tokens: of task generation, the longest text; by default task.max_target_length of the run and 1.

    Raises:
      UserError: the folder or the files cannot be used, or the model's head is of another task.
    """
    examples = TASKS[name].read(files)
    tuned = load.read_task(path)
    step = load.find_step(path, step)
    if tuned and adaptation.scores_per_row(tuned):
        if shots:
            raise UserError(f"{path} answers by its head: it takes no shots, choices or rule of likelihoods")
        found = _by_head(path, tuned, name, examples, step, batch_size)
    elif isinstance(examples[0], Generation):
        found = _by_writing(path, tuned, examples, step, batch_size, new_tokens)
    else:
        found = _by_likelihood(path, name, examples, step, batch_size, shots or Shots())
    asked = {"task": name, "checkpoint": str(path), "step": step, "data": [Path(file).name for file in files]}
    return dataclasses.replace(found, results={**asked, "examples": len(examples), **found.results})


def _by_head(
    path: str | Path, tuned: FinetuneConfig, name: Name, examples: list[Example], step: int | None, batch_size: int
) -> Evaluation:
    if _answers(name) != _answers(tuned.task.name):
        raise UserError(
            f"{path} has a head for {tuned.task.name}{_labels(tuned.task.name)}, and {name}{_labels(name)} needs "
            f"another: fine-tune the model on {name}"
        )
    asked = dataclasses.replace(tuned, task=dataclasses.replace(tuned.task, name=name), model=load.read_config(path))
    mesh = load.make_mesh(asked.model)
    encoded = encoding.encode(asked, load.load_tokenizer(path), examples)
    logger.info("%s", encoded.description(asked))
    # A question of multiple choice is a row for each choice.
    size = max(1, batch_size // encoded.choices) * mesh.size
    batches = tqdm(
        encoding.eval_batches(encoded, size, sharding.batch_sharding(mesh)),
        desc=name,
        unit=" batches",
        total=-(-len(encoded) // size),
        disable=None,
    )
    with jax.set_mesh(mesh):
        params = load.load_on_mesh(path, step, mesh)
        found = scoring.gather(heads.jit_scores(asked, mesh), params, batches, len(encoded))
    return _answered(name, examples, found, {"answered_by": "head", "cut": encoded.cut})


def _answers(name: str) -> tuple[bool, tuple[str, ...]]:
    """What a head for a task chooses among: choices, or these labels."""
    return name in MULTIPLE_CHOICE, TASKS[name].labels


def _labels(name: str) -> str:
    return f" ({', '.join(TASKS[name].labels)})" if TASKS[name].labels else ""


def _by_likelihood(
    path: str | Path, name: str, examples: list[Example], step: int | None, batch_size: int, shots: Shots
) -> Evaluation:
    config = Config(model=load.read_config(path))
    prompts = [likelihood.make_prompt(name, example, shots.choices) for example in examples]
    shown = []
    for shot in shots.examples:
        if (label := _label(shot)) is None:
            raise UserError(f"the shot {shot.id} has no answer to be shown")
        shown.append((likelihood.make_prompt(name, shot, shots.choices), label))
    prompts = [likelihood.with_shots(prompt, shown) for prompt in prompts]
    mesh = load.make_mesh(config.model)
    with jax.set_mesh(mesh):
        params = load.load_on_mesh(path, step, mesh)
        scorer = likelihood.Scorer(config, mesh, params, load.load_tokenizer(path), batch_size * mesh.size)
        by_rule = likelihood.scores(scorer, prompts)
    if scorer.cut:
        logger.warning("%d rows were longer than the model reads: their beginning was cut", scorer.cut)
    padded = {rule: _padded(found) for rule, found in by_rule.items()}
    about: dict[str, Any] = {"answered_by": "likelihood", "rule": shots.rule, "shots": len(shown), "cut": scorer.cut}
    if isinstance(examples[0], MultipleChoice):
        about["choices"] = shots.choices
    known, labels = _known(examples)
    if known:
        about["accuracy_by_rule"] = {rule: scoring.accuracy(found[known], labels) for rule, found in padded.items()}
    return _answered(name, examples, padded[shots.rule], about)


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=-np.inf) for row in rows])


def _label(example: Example) -> int | None:
    assert not isinstance(example, Generation)
    return example.label


def _known(examples: Sequence[Example]) -> tuple[list[int], np.ndarray]:
    """Which examples tell their answers, and these."""
    labels = [_label(example) for example in examples]
    known = [i for i, label in enumerate(labels) if label is not None]
    return known, np.array([labels[i] for i in known], int)


def _answered(name: str, examples: list[Example], scores: np.ndarray, about: dict[str, Any]) -> Evaluation:
    names: Sequence[str] = TASKS[name].labels or LETTERS
    predictions = [
        {
            "id": example.id,
            "scores": {names[i]: float(score) for i, score in enumerate(row) if score > np.finfo(np.float32).min},
            "prediction": names[int(row.argmax())],
            "gold": None if (label := _label(example)) is None else names[label],
        }
        for example, row in zip(examples, scores, strict=True)
    ]
    known, labels = _known(examples)
    if not known:
        return Evaluation(predictions, about)
    results = about | summary(scores[known], labels, names, name)
    return Evaluation(predictions, results, scoring.calibration(scores[known], labels))


def summary(scores: np.ndarray, labels: np.ndarray, names: Sequence[str], name: str) -> dict[str, Any]:
    """What answers with known labels add up to, as `results.json` holds it."""
    predicted = scores.argmax(axis=1)
    correct = predicted == labels
    counts = np.bincount(labels, minlength=scores.shape[1])
    found: dict[str, Any] = {
        "answered": len(labels),
        "accuracy": float(correct.mean()),
        "accuracy_95": scoring.bootstrap_interval(correct),
    }
    if TASKS[name].labels:
        # Places of choices are no classes.
        found["macro_f1"] = scoring.macro_f1(predicted, labels)
    return found | {
        "majority": {"answer": names[int(counts.argmax())], "accuracy": float(counts.max() / len(labels))},
        "log_loss": scoring.log_loss(scores, labels),
        "calibration_error": scoring.expected_calibration_error(scores, labels),
    }


def _by_writing(
    path: str | Path,
    tuned: FinetuneConfig | None,
    examples: list[Example],
    step: int | None,
    batch_size: int,
    new_tokens: int | None,
) -> Evaluation:
    if any(example.target is not None for example in examples):  # type: ignore[union-attr]
        scoring.import_rouge()  # hours before it is needed
    load.check_language_model(path)
    model, tokenizer = load.read_config(path), load.load_tokenizer(path)
    most_source = tuned.task.max_source_length if tuned else model.n_positions
    if new_tokens is None:
        new_tokens = tuned.task.max_target_length + 1 if tuned else 100
    config = dataclasses.replace(TEXT_GENERATION, max_new_tokens=new_tokens)
    sources = tokenizer.encode_batch([example.source for example in examples])  # type: ignore[union-attr]
    cut = sum(len(ids) > most_source for ids in sources)
    prompts = [ids[:most_source] + encoding.prompt_end(tuned, tokenizer) for ids in sources]
    generation.check_prompts(model, config, prompts, [f"the source of {example.id}" for example in examples])
    weights = decoding.lay_out(model, load.load_on_mesh(path, step, load.make_mesh(model)))
    made = generation.generate_all(model, weights, prompts, config, tokenizer.eos_id, batch_size)
    texts = [generation.text_of(tokenizer, one.tokens).strip() for one in made]
    targets = [example.target for example in examples]  # type: ignore[union-attr]
    predictions = [
        {"id": example.id, "prediction": text, "gold": target}
        for example, text, target in zip(examples, texts, targets, strict=True)
    ]
    results: dict[str, Any] = {"answered_by": "writing", "cut": cut, "settings": dataclasses.asdict(config)}
    pairs = [(target, text) for target, text in zip(targets, texts, strict=True) if target is not None]
    return Evaluation(predictions, results | ({"answered": len(pairs), **scoring.rouge(pairs)} if pairs else {}))


def write(evaluation: Evaluation, folder: Path) -> None:
    """Writes predictions, results, and a picture of calibration into a folder that is there."""
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in evaluation.predictions)
    replace_file(folder / PREDICTIONS_FILE, lines.encode())
    replace_file(folder / RESULTS_FILE, json.dumps(evaluation.results, indent=2).encode() + b"\n")
    (folder / PICTURE_FILE).unlink(missing_ok=True)
    if evaluation.calibration:
        _draw(evaluation.results, *evaluation.calibration, folder / PICTURE_FILE)


def _draw(results: dict[str, Any], confidence: np.ndarray, accuracy: np.ndarray, share: np.ndarray, path: Path) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8, label="as confident as right")
    axes.scatter(confidence, accuracy, s=20 + 600 * share, alpha=0.6)
    axes.plot(confidence, accuracy, linewidth=1)
    axes.axhline(results["majority"]["accuracy"], linestyle=":", color="tab:red", label="always the majority")
    low, high = results["accuracy_95"]
    title = f"{results['task']}: accuracy {results['accuracy']:.1%} ({low:.1%} to {high:.1%})"
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the answer", ylabel="part that is right", title=title)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
