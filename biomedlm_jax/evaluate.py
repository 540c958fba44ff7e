"""Command: how well a model predicts held-out text, or answers the questions of a task.

python -m biomedlm_jax.evaluate --checkpoint RUN --data FILE...
python -m biomedlm_jax.evaluate --checkpoint RUN --task medqa --data FILE...
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any, get_args

from etils import epy

from biomedlm_jax.errors import UserError, run_command
from biomedlm_jax.files import check_output, replace_file
from biomedlm_jax.finetune_config import Name
from biomedlm_jax.text_options import add_selection, selection

with epy.lazy_imports():
    from biomedlm_jax import evaluation, perplexity, scoring, tasks


def main() -> None:
    """Prints what the model makes of the text or the questions, and writes it down."""
    args = _parse_args()
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.task:
        _evaluate_task(args)
    else:
        _evaluate_text(args)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m biomedlm_jax.evaluate",
        description=(
            "Without --task: loss and perplexity on held-out text. Documents are joined with the end-of-text token, "
            "and read in rows of the model's n_positions; the first token of a row is not predicted. A run trained "
            "with data.document_attention is evaluated with it. With --task: answers to its questions, by the head of "
            "a model that was fine-tuned to have one, else by how likely the model finds each choice."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of a run, or a Hugging Face folder")
    parser.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint of a run; if not given the newest, or the best"
    )
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="GLOB",
        help="text of any format that prepare reads, told apart by name and content, or the files of the task",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="ROWS", help="rows a step and device")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a JSON file for the numbers; with --task a folder for predictions.jsonl, results.json and "
        "calibration.png, evaluations/TASK in the checkpoint's if not given",
    )
    add_selection(parser.add_argument_group("held-out text"))  # type: ignore[arg-type]
    task = parser.add_argument_group("tasks")
    task.add_argument("--task", choices=get_args(Name), help="what the questions are")
    task.add_argument(
        "--choices",
        choices=("texts", "letters"),
        default="texts",
        help="of multiple choice by likelihood: the choices' texts behind the question, or letters behind all of them",
    )
    task.add_argument(
        "--rule",
        choices=("sum", "length", "prior"),
        default="length",
        help="by likelihood, a choice's score: its log-likelihood, that over its characters, or that less its "
        "log-likelihood without the question; results.json has the accuracy of all three",
    )
    task.add_argument("--shots", type=int, default=0, metavar="N", help="answered questions before each, by likelihood")
    task.add_argument("--shots-data", nargs="+", metavar="GLOB", help="files to take the first N of them from")
    task.add_argument("--max-new-tokens", type=int, metavar="N", help="of task generation; as in training if not given")
    return parser.parse_args()


def _evaluate_text(args: argparse.Namespace) -> None:
    check_output("--output", args.output)
    results = perplexity.evaluate(
        args.checkpoint, args.data, step_number=args.step, selection=selection(args), batch_size=args.batch_size
    )
    if len(results["by_source"]) > 1:
        for source, of_source in results["by_source"].items():
            print(f"{source}: {_line(of_source)}")
    print(_line(results) + (f"; left out: {results['dropped']}" if results["dropped"] else ""))
    if args.output:
        replace_file(args.output, json.dumps(results, indent=2).encode() + b"\n")


def _line(results: dict[str, Any]) -> str:
    return (
        f"{results['documents']:,} documents, {results['tokens']:,} tokens: loss {results['loss']:.4f} nats a token, "
        f"perplexity {results['perplexity']:.2f}, {results['bits_per_byte']:.4f} bits a byte"
    )


def _evaluate_task(args: argparse.Namespace) -> None:
    output = Path(args.output or Path(args.checkpoint) / evaluation.FOLDER / args.task)
    # Before the work, whose result it shall hold; made at the end, so that a failure leaves nothing.
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"--output {output} cannot be made, as {there} is no folder that can be written to")
    shots = evaluation.Shots(tuple(_shots(args)), args.choices, args.rule)
    evaluated = evaluation.evaluate(
        args.checkpoint,
        args.task,
        args.data,
        step=args.step,
        batch_size=args.batch_size,
        shots=None if shots == evaluation.Shots() else shots,
        new_tokens=args.max_new_tokens,
    )
    output.mkdir(parents=True, exist_ok=True)
    evaluation.write(evaluated, output)
    print(scoring.describe(evaluated.results))
    print(f"written to {output}: {evaluation.PREDICTIONS_FILE}, {evaluation.RESULTS_FILE}")


def _shots(args: argparse.Namespace) -> list[Any]:
    if args.shots < 0 or bool(args.shots) != bool(args.shots_data):
        raise UserError("--shots N needs --shots-data, files to take them from, and the other way round")
    if not args.shots:
        return []
    examples = tasks.TASKS[args.task].read(args.shots_data)
    if len(examples) < args.shots:
        raise UserError(f"--shots {args.shots}: {' '.join(args.shots_data)} has {len(examples)} examples")
    return examples[: args.shots]


if __name__ == "__main__":
    run_command(main)
