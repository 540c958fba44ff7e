"""Command: trains, shows and exports tokenizers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epy

from biomedlm_jax.config import DataConfig
from biomedlm_jax.errors import UserError, run_command
from biomedlm_jax.text_options import add_selection, selection
from biomedlm_jax.tokenizer import (
    PUBLISHED_VOCAB_SIZE,
    TRAINING_BYTES,
    export_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

# `--help` answers before TensorFlow Datasets is loaded.
with epy.lazy_imports():
    from biomedlm_jax import corpus


def _train(args: argparse.Namespace) -> None:
    if any(Path(args.output, name).exists() for name in ("tokenizer.model", "vocab.json")):
        raise UserError(f"{args.output} already holds a tokenizer; choose another --output, or remove it")
    reading = _Reading(args.input, args)
    tokenizer = train_tokenizer(corpus.tokenizer_texts(reading.documents), args.vocab_size, args.output)
    if reading.left_out:
        print(reading.left_out)
    print(f"{args.output}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint[:16]}")


class _Reading:
    """Files, and what was left out of them when they were read last."""

    def __init__(self, patterns: Sequence[str], args: argparse.Namespace):
        self._files = corpus.expand_globs(patterns)
        self._selection = selection(args)
        self._report = corpus.ReadReport()

    def documents(self) -> Iterator[corpus.Document]:
        """All documents.

        Raises:
          UserError: at the end, if too many records were broken or no text was there.
        """
        self._report = corpus.ReadReport()
        yield from corpus.read_mixed(self._files, self._report, self._selection)
        self._report.check(DataConfig.max_bad_fraction)
        if not self._report.documents:
            names = ", ".join(map(corpus.shown, self._files[:3])) + (", ..." if len(self._files) > 3 else "")
            raise UserError(f"no text in {names}: records left out are {dict(self._report.dropped)}")

    @property
    def left_out(self) -> str:
        """In a line, with the first place of each reason; empty if nothing was."""
        report = self._report
        reasons = (f"{count:,} {reason} ({report.samples[reason][0]})" for reason, count in report.dropped.items())
        return f"left out: {', '.join(reasons)}" if report.dropped else ""


def _inspect(args: argparse.Namespace) -> None:
    from biomedlm_jax.tokenizer import inspection

    if not args.words and not args.data:
        raise UserError("nothing to show: give words, or --data FILE...")
    tokenizers = {"": load_tokenizer(args.directory)}
    if args.gpt2:
        tokenizers["GPT-2"] = load_tokenizer(args.gpt2)
    measured = None
    if args.data:
        reading = _Reading(args.data, args)
        measured = inspection.measure(reading.documents(), args.words, tokenizers)
    # A terminal of another encoding than UTF-8 shows what it can.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    tables = []
    if args.words:
        tables.append(inspection.words_table(args.words, tokenizers, measured))
    if measured:
        tables.append(inspection.bytes_table(measured, tokenizers))
        if reading.left_out:
            tables.append(reading.left_out)
    try:
        print("\n\n".join(tables), flush=True)
    except BrokenPipeError:  # `| head` has seen enough, and Python's last flush must not fail as well
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _export(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.directory)
    names = ("tokenizer.model", "vocab.json", "tokenizer.json")
    if any(Path(args.output, name).exists() for name in names) and (
        load_tokenizer(args.output).fingerprint != tokenizer.fingerprint
    ):
        raise UserError(f"{args.output} already holds another tokenizer; choose another --output, or remove it")
    export_tokenizer(tokenizer, args.output, model_max_length=args.model_max_length)
    print(f"{args.output}: {tokenizer.vocab_size} tokens, for AutoTokenizer.from_pretrained")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m biomedlm_jax.tokenizer", description="Tokenizers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    formatter = argparse.ArgumentDefaultsHelpFormatter
    train = commands.add_parser("train", help="train SentencePiece on text", formatter_class=formatter)
    train.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="GLOB",
        help="files or URLs of any format that prepare reads, told apart by name and content; only PubMed abstracts "
        f"are used where there are any, and the first {TRAINING_BYTES // 10**6} MB (prepare takes a sample of all)",
    )
    add_selection(train)
    train.add_argument("--output", required=True, metavar="DIR", help="folder to write tokenizer.model to")
    train.add_argument("--vocab-size", type=int, default=PUBLISHED_VOCAB_SIZE, metavar="N", help="number of tokens")
    train.set_defaults(run=_train)
    inspect = commands.add_parser(
        "inspect", help="show the pieces of words, and bytes a token of text", formatter_class=formatter
    )
    inspect.add_argument("directory", metavar="DIR", help="folder of a tokenizer")
    inspect.add_argument("words", nargs="*", metavar="WORD", help="shown at the start of a text and after a space")
    inspect.add_argument(
        "--gpt2",
        metavar="DIR",
        help="folder of a tokenizer to compare with: GPT-2's encoder.json and vocab.bpe, or any other",
    )
    inspect.add_argument(
        "--data",
        nargs="+",
        metavar="GLOB",
        help="files, as of train, in which to count the words and the bytes a token",
    )
    add_selection(inspect)
    inspect.set_defaults(run=_inspect)
    export = commands.add_parser("export", help="write Hugging Face's files", formatter_class=formatter)
    export.add_argument("directory", metavar="DIR", help="folder of a tokenizer")
    export.add_argument("--output", required=True, metavar="DIR", help="folder that AutoTokenizer can read")
    export.add_argument("--model-max-length", type=int, default=1024, metavar="N", help="the model's positions")
    export.set_defaults(run=_export)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_command(main)
