"""The card of an exported model: what it is, what it was made from and how, what it reached, and what it is not for."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from biomedlm_jax import evaluation, metrics, scoring
from biomedlm_jax.config import Config, as_paths
from biomedlm_jax.finetune_config import GENERATION, MULTIPLE_CHOICE, FinetuneConfig
from biomedlm_jax.huggingface import MEMORY_FOLDER, asked_as

# Of the licence of BioMedLM: https://huggingface.co/stanford-crfm/BioMedLM
LIMITS = (
    "What a language model writes can be wrong, harmful or made up. It is for research and no medical advice: "
    "nobody's treatment may rest on it."
)

_LICENCE = (
    "The licences of what this model was made from hold: of its text and questions, and of the weights that it began "
    "from. Those of stanford-crfm/BioMedLM are under BigScience's BLOOM RAIL 1.0, whose limits on use go with every "
    "model made from them, medical advice among what it excludes. Write here which it is."
)

_USE = {
    "GPT2LMHeadModel": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
inputs = tokenizer("Photosynthesis is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))""",
    "GPT2ForSequenceClassification": """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
context, question = "An abstract.", "Is it so?"
# Context and question are encoded apart, and follow each other without anything between them.
ids = torch.tensor([(tokenizer.encode(context) + tokenizer.encode(question))[MAX_LENGTH]])
print(model.config.id2label[model(ids).logits.argmax().item()])""",
    "GPT2ForMultipleChoice": """\
from transformers import AutoModelForMultipleChoice, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForMultipleChoice.from_pretrained(FOLDER, trust_remote_code=True)  # the .py file beside the weights
question, choices = "Which of these is a vitamin?", ["ascorbic acid", "sodium chloride"]
rows = [f"{question}[SEP] {choice}[SEP]" for choice in choices]
inputs = tokenizer(rows, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
scores = model(**{name: value[None] for name, value in inputs.items()}).logits[0]
print(choices[scores.argmax()])""",
}


def make(run_dir: Path, step: int, config: Config | FinetuneConfig, architecture: str) -> str:
    """The card of a run's checkpoint, in Markdown."""
    use = _USE[architecture]
    if isinstance(config, FinetuneConfig):
        length, side = config.task.max_length, config.task.truncation_side
        use = use.replace("[MAX_LENGTH]", f"[:{length}]" if side == "right" else f"[-{length}:]")
        use = use.replace("MAX_LENGTH", str(length))
        if config.task.name in GENERATION:
            use = use.replace('"Photosynthesis is"', '"A text to be rewritten.<|startoftext|>"')
    model = config.model
    inverse = " Attention scores of layer i are divided by i + 1." if model.scale_attn_by_inverse_layer_idx else ""
    parts = [
        "---\nlibrary_name: transformers\nlicense: other\nlanguage: en\ntags: [biology, medical]\n---",
        f"# {run_dir.resolve().name}",
        f"A GPT-2 of {model.n_layer} layers, {model.n_embd} wide, with {model.n_head} heads, {model.vocab_size:,} "
        f"words and {model.n_positions:,} positions, {_purpose(run_dir, step, config)}.{inverse}",
        f"## Use\n\n```python\n{use}\n```",
        *([] if _is_import(run_dir) else [f"## Data\n\n{_data(config)}", f"## Settings\n\n{_settings(config)}"]),
        f"## Results\n\n{_results(run_dir, step)}",
        f"## Limits\n\n{LIMITS}",
        f"## Licence\n\n{_LICENCE}",
    ]
    return "\n\n".join(parts) + "\n"


def _is_import(run_dir: Path) -> bool:
    """Whether a run only holds what was converted from another folder, and none of its settings mean anything."""
    return (run_dir / MEMORY_FOLDER).is_dir() and not (run_dir / metrics.METRICS_FILE).is_file()


def _purpose(run_dir: Path, step: int, config: Config | FinetuneConfig) -> str:
    if _is_import(run_dir):
        return "converted by biomedlm_jax from a Hugging Face folder, and back"
    by = f"with biomedlm_jax; step {step:,} of {config.train.steps:,}"
    if isinstance(config, Config):
        return f"trained {by}"
    kind = "answer multiple-choice questions" if config.task.name in MULTIPLE_CHOICE else "classify texts"
    if config.task.name in GENERATION:
        kind = "write texts from others"
    return f"fine-tuned to {kind} ({config.task.name}) {by}"


def _data(config: Config | FinetuneConfig) -> str:
    if isinstance(config, FinetuneConfig):
        parts = [f"- started from: {Path(config.run.init_from).name}"]
        parts += [f"- training examples of {config.task.name}: {_names(config.task.train_files)}"]
        if as_paths(config.task.eval_files):
            parts.append(f"- dev set, by which this checkpoint was chosen: {_names(config.task.eval_files)}")
        return "\n".join(parts)
    data = config.data
    if data.mixture:
        return "\n".join(f"- {Path(folder).name}, weight {weight:g}" for folder, weight in data.mixture.items())
    started = f"- started from: {Path(config.run.init_from).name}\n" if config.run.init_from else ""
    if not as_paths(data.train_files) and data.source != "synthetic":
        return f"{started}- rows that were prepared before: {Path(data.dir).name or 'not known'}"
    files = f": {_names(data.train_files)}" if as_paths(data.train_files) else ""
    return f"{started}- text of source {data.source}{files}"


def _names(paths: Any) -> str:
    """Files without folders, which say more of a machine than of the data."""
    return ", ".join(Path(path).name for path in as_paths(paths))


def _settings(config: Config | FinetuneConfig) -> str:
    groups = ("lora", "optimizer", "train") if isinstance(config, FinetuneConfig) else ("optimizer", "train")
    lines = ["| setting | value |", "|---|---|"]
    if isinstance(config, FinetuneConfig):
        lines += [f"| task.{name} | {value} |" for name, value in asked_as(config).items()]
    for group in groups:
        if group == "lora" and isinstance(config, FinetuneConfig) and not config.lora.rank:
            continue
        for name, value in dataclasses.asdict(getattr(config, group)).items():
            lines.append(f"| {group}.{name} | {value} |")
    rates = {name: getattr(config.model, name) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    lines += [f"| model.{name} | {rate} |" for name, rate in rates.items()]
    return "\n".join([*lines, f"| model.compute_dtype | {config.model.compute_dtype} |"])


def _results(run_dir: Path, step: int) -> str:
    lines = []
    if (run_dir / metrics.METRICS_FILE).is_file():
        at_step = [line for line in metrics.read_metrics(run_dir) if line["step"] == step]
        lines += [f"- {name}: {value:.4f}" for line in at_step for name, value in line.items() if name[:5] == "eval/"]
    files = sorted(run_dir.glob(f"{evaluation.FOLDER}/*/{evaluation.RESULTS_FILE}"))
    for results in (json.loads(file.read_text()) for file in files):
        if results.get("step") == step:
            lines.append(f"- {', '.join(results['data'])}: {scoring.describe(results)}")
    return "\n".join(lines) or "None were measured."
