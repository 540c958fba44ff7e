"""Command: loss and perplexity of a model on held-out text.

python -m biomedlm_jax.evaluate --checkpoint RUN --data FILE...
"""

import argparse
import functools
import json
import math
from pathlib import Path
from typing import Any

from etils import epy
from tqdm import tqdm

from biomedlm_jax.errors import UserError, run_command
from biomedlm_jax.files import check_output, replace_file

with epy.lazy_imports():
    import jax
    import numpy as np

    from biomedlm_jax import config as config_lib
    from biomedlm_jax import corpus, data, load, metrics, model, rows, sharding, step


def main() -> None:
    """Prints what the model makes of the text, and writes it to `--output`."""
    parser = argparse.ArgumentParser(
        prog="python -m biomedlm_jax.evaluate",
        description=(
            "Loss and perplexity on held-out text. Documents are joined with the end-of-text token, and read in rows "
            "of the model's n_positions; the first token of a row is not predicted. A run trained with "
            "data.document_attention is evaluated with it."
        ),
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="folder of a run, or a Hugging Face GPT-2 folder"
    )
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint of a run (default: the newest)")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="GLOB",
        help="The Pile's JSON lines (.jsonl, .jsonl.gz, .jsonl.zst), or plain text",
    )
    parser.add_argument(
        "--pile-sets",
        nargs="+",
        default=["PubMed Abstracts", "PubMed Central"],
        metavar="SET",
        help="which of The Pile's sets to keep (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="ROWS", help="rows a step and device (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", help="also write the numbers to this JSON file")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {args.batch_size}")
    check_output("--output", args.output)
    results = evaluate(
        args.checkpoint, args.data, step_number=args.step, pile_sets=args.pile_sets, batch_size=args.batch_size
    )
    print(
        f"{results['documents']:,} documents, {results['tokens']:,} tokens: loss {results['loss']:.4f} nats a token, "
        f"perplexity {results['perplexity']:.2f}, {results['bits_per_byte']:.4f} bits a byte"
        + (f"; left out: {results['dropped']}" if results["dropped"] else "")
    )
    if args.output:
        replace_file(args.output, json.dumps(results, indent=2).encode() + b"\n")


def evaluate(
    path: str | Path, patterns: list[str], *, step_number: int | None = None, pile_sets: list[str], batch_size: int
) -> dict[str, Any]:
    """Loss of the model in `path` over the text in `patterns`.

    Args:
      path: folder of a run, or a Hugging Face folder.
      patterns: files or globs; JSON lines by their name, else plain text.
      step_number: which checkpoint of a run, by default the newest.
      pile_sets: The Pile's sets to keep.
      batch_size: rows a step and device.

    Returns:
      'loss' in nats a predicted token, 'perplexity', 'bits_per_byte' (comparable between tokenizers), 'documents',
      'tokens' (predicted), 'bytes' of text, and what was 'dropped' while reading.

    Raises:
      UserError: the folder, its tokenizer or the text cannot be used.
    """
    document_attention = load.document_attention(path)
    config = config_lib.Config(model=load.read_config(path))
    tokenizer = load.load_tokenizer(path)
    report = corpus.ReadReport()
    held_out = _read_rows(patterns, tokenizer, config.model.n_positions, report, corpus.Selection(tuple(pile_sets)))

    devices = jax.device_count()
    fsdp = math.gcd(devices, config.model.n_embd)
    mesh = sharding.make_mesh(config_lib.MeshConfig(replica=devices // fsdp, fsdp=fsdp))
    abstract = jax.eval_shape(functools.partial(model.init_params, config.model, 0))
    params = load.load_params(path, step_number, sharding.tree_shardings(mesh, abstract))
    eval_step = step.jit_eval_step(config, mesh)
    batches = data.eval_batches(
        held_out, batch_size * devices, sharding.batch_sharding(mesh), document_attention=document_attention
    )
    count = data.eval_batch_count(held_out, batch_size * devices)
    progress = tqdm(batches, desc="evaluating", unit=" batches", disable=None, total=count)
    with jax.set_mesh(mesh):
        nll, tokens = step.held_out_loss(eval_step, params, progress)
    loss = nll / tokens
    if not math.isfinite(loss):
        raise UserError(f"{path}: the loss is {loss}: the weights hold numbers that are not finite")
    return {
        "loss": loss,
        "perplexity": metrics.perplexity(loss),
        # Of all tokens: the first ones of rows, which are not predicted, count as the others do on average.
        "bits_per_byte": loss * held_out.tokens / math.log(2) / report.bytes,
        "tokens": int(tokens),
    } | report.as_dict()


def _read_rows(patterns: list[str], tokenizer: Any, n_positions: int, report: Any, selection: Any) -> Any:
    """The text as rows in memory, the last one padded."""
    documents = corpus.read_mixed(corpus.expand_globs(patterns), report, selection)
    progress = tqdm(documents, desc="encoding", unit=" documents", disable=None)
    packed = list(rows.pack_rows(progress, tokenizer, n_positions))
    report.check(config_lib.DataConfig().max_bad_fraction)
    tokens = sum(map(len, packed))
    if tokens < 2:
        raise UserError(f"{' '.join(patterns)}: no text to evaluate; left out: {dict(report.dropped)}")
    packed[-1] = np.pad(packed[-1], (0, n_positions - len(packed[-1])))
    return rows.Rows([{"tokens": row} for row in packed], n_positions, tokens, "", tokenizer.eos_id)


if __name__ == "__main__":
    run_command(main)
