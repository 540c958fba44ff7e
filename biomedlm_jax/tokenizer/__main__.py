"""The command: trains, inspects and exports tokenizers."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from biomedlm_jax.errors import UserError, run_command
from biomedlm_jax.tokenizer import Tokenizer, export_tokenizer, load_tokenizer, train_tokenizer

PUBLISHED_VOCAB_SIZE = 28_896  # https://huggingface.co/stanford-crfm/BioMedLM


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
            f"no text to train on in {', '.join(files[:3])}{', ...' if len(files) > 3 else ''}: "
            f"records left out are {dict(report.dropped)}"
        )
    return chain([first], texts)


def _inspect(args: argparse.Namespace) -> None:
    if not args.words and not args.data:
        raise UserError("nothing to inspect: give words, or --data with files of text")
    tokenizers = {"": load_tokenizer(args.directory)}
    if args.gpt2:
        tokenizers["GPT-2 "] = load_tokenizer(args.gpt2)
    counts, sizes = _measure(tokenizers, args.words, args.data) if args.data else (Counter(), {})
    if args.words:
        _print_words(tokenizers, args.words, counts if args.data else None)
    if args.words and args.data:
        print()
    if args.data:
        _print_sizes(tokenizers, sizes)


def _print_words(tokenizers: Mapping[str, Tokenizer], words: Sequence[str], counts: Counter[str] | None) -> None:
    # Within text a word follows a space, and its pieces are others.
    rows = [["text", *(["occurs"] if counts is not None else []), *_columns(tokenizers, "tokens", "pieces")]]
    for word in words:
        for text in (word, " " + word):
            encoded = [(tokenizer, tokenizer.encode(text)) for tokenizer in tokenizers.values()]
            shown = [cell for one, ids in encoded for cell in (str(len(ids)), " | ".join(map(one.piece, ids)))]
            rows.append([repr(text), *([f"{counts[text]:,}"] if counts is not None else []), *shown])
    _print_table(rows, left={0, *(column for column, name in enumerate(rows[0]) if name.endswith("pieces"))})


def _print_sizes(tokenizers: Mapping[str, Tokenizer], sizes: Mapping[str, Counter[str]]) -> None:
    rows = [["text", "documents", "bytes", *_columns(tokenizers, "tokens", "bytes/token")]]
    total: Counter[str] = Counter()
    for counts in sizes.values():
        total.update(counts)
    for source, counts in [*sorted(sizes.items()), *([("all", total)] if len(sizes) > 1 else [])]:
        tokens = [counts[f"{name}tokens"] for name in tokenizers]
        shown = [cell for count in tokens for cell in (f"{count:,}", f"{counts['bytes'] / count:.3f}")]
        rows.append([source, f"{counts['documents']:,}", f"{counts['bytes']:,}", *shown])
    _print_table(rows, left={0})


def _columns(tokenizers: Mapping[str, Tokenizer], *names: str) -> list[str]:
    return [prefix + name for prefix in tokenizers for name in names]


def _print_table(rows: Sequence[Sequence[str]], left: Set[int]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _measure(
    tokenizers: Mapping[str, Tokenizer], words: Sequence[str], patterns: Sequence[str]
) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """How often words occur alone and after a space; documents, bytes and tokens by source of the text."""
    from biomedlm_jax import corpus

    report = corpus.ReadReport()
    documents = corpus.read_mixed(corpus.expand_globs(patterns), report, corpus.Selection(pile_sets=()))
    # As a whole word: neither in a longer one nor in a part of one.
    places = {word: re.compile(rf"(^|.)(?<!\w){re.escape(word)}(?!\w)", re.DOTALL) for word in words}
    counts: Counter[str] = Counter()
    sizes: dict[str, Counter[str]] = {}
    for document in tqdm(documents, desc="reading", unit=" documents", disable=None):
        of_source = sizes.setdefault(document.source, Counter())
        of_source.update(documents=1, bytes=len(document.text.encode()))
        of_source.update({f"{name}tokens": len(one.encode(document.text)) for name, one in tokenizers.items()})
        for word, place in places.items():
            for match in place.finditer(document.text):
                counts[" " + word if match[1] == " " else word] += 1
    if not sizes:
        raise UserError(f"no text in --data {' '.join(patterns)}: records left out are {dict(report.dropped)}")
    return counts, sizes


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
        help="files or URLs of text, in any format that prepare reads; only "
        "PubMed abstracts are used where there are any",
    )
    train.add_argument("--output", required=True, metavar="DIR", help="folder to write tokenizer.model to")
    train.add_argument("--vocab-size", type=int, default=PUBLISHED_VOCAB_SIZE, metavar="N", help="number of tokens")
    train.set_defaults(run=_train)
    inspect = commands.add_parser("inspect", help="show the pieces of words", formatter_class=argparse.HelpFormatter)
    inspect.add_argument("directory", metavar="DIR", help="folder of a tokenizer")
    inspect.add_argument("words", nargs="*", metavar="WORD", help="shown alone and after a space")
    inspect.add_argument("--gpt2", metavar="DIR", help="folder of GPT-2's tokenizer, to stand beside it")
    inspect.add_argument(
        "--data", nargs="+", metavar="GLOB", help="files of text: counts the words in them, and bytes a token"
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
