"""Loss and perplexity of a model on held-out text, of each of its sources and of all."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from biomedlm_jax import corpus, data, load, metrics, rows, sharding, step
from biomedlm_jax.config import Config, DataConfig
from biomedlm_jax.corpus import Document, ReadReport, Selection
from biomedlm_jax.errors import UserError
from biomedlm_jax.rows import Rows
from biomedlm_jax.tokenizer import Tokenizer


def evaluate(
    path: str | Path,
    patterns: list[str],
    *,
    step_number: int | None = None,
    selection: Selection | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Loss of the model in `path` over the text in `patterns`.

    Args:
      path: folder of a run, or a Hugging Face folder.
      patterns: files or globs, of any of the formats that `prepare` reads.
      step_number: which checkpoint of a run, by default the newest.
      selection: what to keep of the text.
      batch_size: rows a step and device.

    Returns:
      'loss' in nats a predicted token, 'perplexity', 'bits_per_byte' (comparable between tokenizers), 'tokens'
      (predicted), 'bytes' of text, and 'documents'; the same of each source, as 'by_source', whose documents are in
      rows of their own; and what was 'dropped' while reading.

    Raises:
      UserError: the folder, its tokenizer or the text cannot be used.
    """
    load.check_language_model(path)
    document_attention = load.document_attention(path)
    config = Config(model=load.read_config(path))
    tokenizer = load.load_tokenizer(path)
    report = ReadReport()
    by_source = _read(patterns, report, selection or Selection())

    mesh = load.make_mesh(config.model)
    params = load.load_on_mesh(path, step_number, mesh)
    eval_step, sharded = step.jit_eval_step(config, mesh), sharding.batch_sharding(mesh)
    size = batch_size * mesh.size
    sums: dict[str, _Sums] = {}
    for source, documents in by_source.items():
        held_out = _rows(documents, tokenizer, config.model.n_positions)
        batches = tqdm(
            data.eval_batches(held_out, size, sharded, document_attention=document_attention),
            desc=f"evaluating {source}",
            unit=" batches",
            disable=None,
            total=data.eval_batch_count(held_out, size),
        )
        with jax.set_mesh(mesh):
            nll, predicted = step.held_out_loss(eval_step, params, batches)
        if not math.isfinite(nll):
            raise UserError(f"{path}: the loss is {nll}: the weights hold numbers that are not finite")
        n_bytes = sum(len(document.text.encode()) for document in documents)
        sums[source] = _Sums(nll, int(predicted), held_out.tokens, n_bytes, len(documents))
    total = _Sums(*map(sum, zip(*sums.values(), strict=True)))
    if not total.predicted:
        raise UserError(f"{' '.join(patterns)}: no text to evaluate; left out: {dict(report.dropped)}")
    of_sources = {source: of_source.numbers() for source, of_source in sums.items() if of_source.predicted}
    return {**total.numbers(), "by_source": of_sources, **report.as_dict()}


class _Sums(NamedTuple):
    """Over documents."""

    nll: float
    predicted: int
    tokens: int
    bytes: int
    documents: int

    def numbers(self) -> dict[str, Any]:
        """What `evaluate` returns of them."""
        loss = self.nll / self.predicted
        return {
            "loss": loss,
            "perplexity": metrics.perplexity(loss),
            # Of all tokens: the first ones of rows, which are not predicted, count as the others do on average.
            "bits_per_byte": loss * self.tokens / math.log(2) / self.bytes,
            "tokens": self.predicted,
            "bytes": self.bytes,
            "documents": self.documents,
        }


def _read(patterns: list[str], report: ReadReport, selection: Selection) -> dict[str, list[Document]]:
    """The documents by their source."""
    documents = corpus.read_mixed(corpus.expand_globs(patterns), report, selection)
    by_source: dict[str, list[Document]] = defaultdict(list)
    for document in tqdm(documents, desc="reading", unit=" documents", disable=None):
        by_source[document.source].append(document)
    report.check(DataConfig().max_bad_fraction)
    if not by_source:
        raise UserError(f"{' '.join(patterns)}: no text to evaluate; left out: {dict(report.dropped)}")
    return by_source


def _rows(documents: list[Document], tokenizer: Tokenizer, n_positions: int) -> Rows:
    """The text as rows in memory, the last one padded."""
    progress = tqdm(documents, desc="encoding", unit=" documents", disable=None)
    packed = list(rows.pack_rows(progress, tokenizer, n_positions))
    tokens = sum(map(len, packed))
    packed[-1] = np.pad(packed[-1], (0, n_positions - len(packed[-1])))
    return Rows([{"tokens": row} for row in packed], n_positions, tokens, "", tokenizer.eos_id)
