"""Command: trains, shows and exports tokenizers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from biomedlm_jax.errors import UserError, run_command
from biomedlm_jax.tokenizer import PUBLISHED_VOCAB_SIZE, export_tokenizer, load_tokenizer, train_tokenizer


def _train(args: argparse.Namespace) -> None:
    from biomedlm_jax import corpus

    if any(Path(args.output, name).exists() for name in ("tokenizer.model", "vocab.json")):
        raise UserError(f"{args.output} already holds a tokenizer; choose another --output, or remove it")
    files = corpus.expand_globs(args.input)
    tokenizer = train_tokenizer(_corpus_texts(files), args.vocab_size, args.output)
    print(f"{args.output}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint[:16]}")


def _corpus_texts(files: Sequence[str]) -> Iterator[str]:
    """The abstracts of `files`, which the published tokenizer was trained on; if there are none, all of their text."""
    from biomedlm_jax import corpus

    report = corpus.ReadReport()
    texts = corpus.tokenizer_texts(lambda: corpus.read_mixed(files, report))
    first = next(texts, None)
    if first is None:
        raise UserError(
            f"no text to train on in {', '.join(map(corpus.shown, files[:3]))}{', ...' if len(files) > 3 else ''}: "
            f"records left out are {dict(report.dropped)}"
        )
    return chain([first], texts)


def _inspect(args: argparse.Namespace) -> None:
    from biomedlm_jax import corpus
    from biomedlm_jax.tokenizer import inspection

    if not args.words and not args.data:
        raise UserError("nothing to show: give words, or --data FILE...")
    tokenizers = {"": load_tokenizer(args.directory)}
    if args.gpt2:
        tokenizers["GPT-2"] = load_tokenizer(args.gpt2)
    measured = None
    if args.data:
        report = corpus.ReadReport()
        documents = corpus.read_mixed(corpus.expand_globs(args.data), report)
        measured = inspection.measure(documents, args.words, tokenizers)
        if not measured.sources:
            raise UserError(f"no text in {' '.join(args.data)}: records left out are {dict(report.dropped)}")
    # A terminal of another encoding than UTF-8 shows what it can.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    tables = []
    if args.words:
        tables.append(inspection.words_table(args.words, tokenizers, measured))
    if measured:
        tables.append(inspection.bytes_table(measured, tokenizers))
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
        help="files of The Pile's JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) or of plain text; only "
        "PubMed abstracts are used where there are any",
    )
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
