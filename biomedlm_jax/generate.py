"""Command: text that a model makes of prompts.

python -m biomedlm_jax.generate --checkpoint RUN --prompt TEXT... | --prompt-file FILE
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from etils import epy

from biomedlm_jax.errors import UserError, run_command
from biomedlm_jax.files import check_output
from biomedlm_jax.generation_config import GenerationConfig

with epy.lazy_imports():
    import numpy as np

    from biomedlm_jax import benchmark_files, decoding, encoding, generation, load, model_card


def main() -> None:
    """Prints what the model makes of the prompts, or writes it to `--output`."""
    parser = argparse.ArgumentParser(
        prog="python -m biomedlm_jax.generate",
        description="Continue prompts: one is shown as it is written, several are JSON lines.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of a run, or a Hugging Face folder")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint of a run; the newest if not given")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="prompts")
    prompts.add_argument(
        "--prompt-file", metavar="FILE", help="a prompt a line (.txt), or JSON lines with the key prompt (.jsonl)"
    )
    parser.add_argument("--output", metavar="FILE", help="write JSON lines there instead of to standard output")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="type of activations; the model's own if not given"
    )
    settings = dataclasses.fields(GenerationConfig)
    for setting in settings:
        option = f"--{setting.name.replace('_', '-')}"
        kind = type(setting.default)
        parser.add_argument(option, type=kind, default=setting.default, metavar="N", help=setting.metadata["help"])
    args = parser.parse_args()
    _generate(args, GenerationConfig(**{setting.name: getattr(args, setting.name) for setting in settings}))


def _generate(args: argparse.Namespace, config: GenerationConfig) -> None:
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {args.batch_size}")
    check_output("--output", args.output)
    if args.prompt:
        texts, names = args.prompt, [f"prompt {number}" for number in range(1, len(args.prompt) + 1)]
    else:
        texts, names = _read_prompts(args.prompt_file)
    for name, text in zip(names, texts, strict=True):
        if not text.strip():
            raise UserError(f"{name} is empty")
    load.check_language_model(args.checkpoint)
    model, tokenizer = load.read_config(args.checkpoint), load.load_tokenizer(args.checkpoint)
    if args.dtype:
        model = dataclasses.replace(model, compute_dtype=args.dtype)
    # To a model of documents apart, a text begins behind the end of another.
    start = [tokenizer.eos_id] if load.document_attention(args.checkpoint) else []
    # One that was fine-tuned to write from a source writes behind its end.
    tuned = load.read_task(args.checkpoint)
    end = encoding.prompt_end(tuned, tokenizer)
    prompts = [start + ids + end for ids in tokenizer.encode_batch(texts)]
    generation.check_prompts(model, config, prompts, names)
    # Over all devices; where they are several, XLA slices activations as the weights are, and sums them.
    weights = decoding.lay_out(model, load.load_on_mesh(args.checkpoint, args.step, load.make_mesh(model)))
    print(model_card.LIMITS, file=sys.stderr)

    if len(texts) == 1 and not args.output and config.num_beams == 1:
        shown = _Stream(tokenizer, texts[0])
        generation.generate(model, weights, prompts, config, tokenizer.eos_id, on_tokens=shown)
        shown.end()
        return
    made = generation.generate_all(model, weights, prompts, config, tokenizer.eos_id, args.batch_size)
    if len(texts) == 1 and not args.output:
        print(texts[0] + generation.text_of(tokenizer, next(made).tokens))
        return
    lines = (_line(tokenizer, *pair) for pair in zip(texts, made, strict=True))
    if not args.output:
        for line in lines:
            print(line, flush=True)
        return
    partial = Path(f"{args.output}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line + "\n")
            file.flush()
    partial.replace(args.output)


def _line(tokenizer: Any, prompt: str, made: Any) -> str:
    """What was made of a prompt, as JSON."""
    text = generation.text_of(tokenizer, made.tokens)
    found = {"prompt": prompt, "text": text, "tokens": len(made.tokens), "ended": made.ended}
    return json.dumps(found, ensure_ascii=False)


def _read_prompts(file: str) -> tuple[list[str], list[str]]:
    """The prompts in a file, and where each stands.

    Raises:
      UserError: it cannot be read, or a prompt is no text; names the line.
    """
    prompts, places = [], []
    for line, record in benchmark_files.records(file):
        prompt = record.get("prompt") if isinstance(record, dict) else record
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{file}:{line}: there is no prompt; a record is a line of text, or an object with prompt")
        prompts.append(prompt)
        places.append(f"{file}:{line}: the prompt")
    if not prompts:
        raise UserError(f"{file}: there are no prompts in it")
    return prompts, places


class _Stream:
    """Shows a text as it is made, behind its prompt. What is not whole yet, as half a character, waits."""

    def __init__(self, tokenizer: Any, prompt: str):
        self._tokenizer, self._prompt, self._ids, self._shown = tokenizer, prompt, list[int](), 0

    def __call__(self, tokens: "np.ndarray") -> None:
        # Not before there is a token: messages come while the model is compiled.
        print(self._prompt, end="")
        self._prompt = ""
        if tokens[0] != self._tokenizer.eos_id:
            self._ids.append(int(tokens[0]))
            self._show(generation.text_of(self._tokenizer, self._ids).rstrip("\ufffd"))

    def _show(self, text: str) -> None:
        print(text[self._shown :], end="", flush=True)
        self._shown = max(self._shown, len(text))

    def end(self) -> None:
        """Shows the rest."""
        self._show(generation.text_of(self._tokenizer, self._ids))
        print(flush=True)


if __name__ == "__main__":
    run_command(main)
