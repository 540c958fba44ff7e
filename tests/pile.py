"""A small corpus in The Pile's format that tests share, and what its rows must be."""

import gzip
import json

import numpy as np
import tiny

from biomedlm_jax import rows, synthetic

ABSTRACTS = [synthetic.generate(index).text for index in range(60)]


def line(text, pile_set="PubMed Abstracts"):
    return json.dumps({"text": text, "meta": {"pile_set_name": pile_set}}) + "\n"


def write_config(folder):
    """Writes two training files and a held-out one; the configuration that prepares them."""
    train, held_out = folder / "train", folder / "val.jsonl"
    train.mkdir()
    lines = [line(text) for text in ABSTRACTS] + [line("int main() {}", "Github")]
    (train / "00.jsonl").write_text("".join(lines[:30]))
    (train / "01.jsonl.gz").write_bytes(gzip.compress("".join(lines[30:]).encode()))
    held_out.write_text(line("Held out\nA text of its own."))
    return tiny.replace(
        model={"vocab_size": 600},
        data={
            "source": "pile",
            "train_files": str(train / "*"),
            "eval_files": str(held_out),
            "dir": str(folder / "prepared"),
        },
    )


def prepared_ids(folder, split):
    opened = rows.open_rows(folder, split)
    return np.concatenate([opened.source[index]["tokens"] for index in range(len(opened))])[: opened.tokens]


def expected_ids(shards, tokenizer, n_positions):
    """The ids of training rows: each shard's whole rows, then the whole rows of what is left of all of them."""
    whole, ends = [], []
    for texts in shards:
        ids = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]]
        cut = len(ids) // n_positions * n_positions
        whole += ids[:cut]
        ends += ids[cut:]
    return whole + ends[: len(ends) // n_positions * n_positions]
