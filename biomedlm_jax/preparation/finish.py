"""The last stage: what all shards made becomes one folder, with a manifest."""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from biomedlm_jax.config import Config
from biomedlm_jax.corpus import MAX_SAMPLES, ReadReport, shown
from biomedlm_jax.errors import UserError
from biomedlm_jax.preparation import card
from biomedlm_jax.preparation.shards import SPLITS, Shard
from biomedlm_jax.rows import FORMAT, MANIFEST_FILE, RowWriter, features, file_template, row_dtype
from biomedlm_jax.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Prepared:
    """What the stages before made, a result a shard."""

    config: Config
    settings: dict[str, Any]
    shards: Sequence[Shard]
    read: Sequence[dict[str, Any]]
    chosen: Sequence[dict[str, Any]]
    encoded: Sequence[dict[str, Any]]
    contamination: dict[str, Any] | None = None


def total_report(results: Sequence[dict[str, Any]]) -> ReadReport:
    """The reports of several shards as one."""
    total = ReadReport()
    for result in results:
        total.documents += result["documents"]
        total.bytes += result["bytes"]
        total.dropped.update(result["dropped"])
        total.replaced_surrogates += result["replaced_surrogates"]
        for reason, places in result["samples"].items():
            kept = total.samples.setdefault(reason, [])
            kept += places[: MAX_SAMPLES - len(kept)]
    return total


def finish(made: Prepared, work: Path, folder: Path) -> None:
    """Fills `folder` with what lies in `work`, which stays as it is until the folder has its name."""
    tokenizer = load_tokenizer(work / "tokenizer")
    tokenizer.save(folder / "tokenizer")
    rows_folder = folder / "rows"
    rows_folder.mkdir()
    splits, infos = {}, []
    for split in SPLITS:
        splits[split], info = _finish_split(made, split, work, rows_folder, tokenizer)
        infos.append(info)
    _check_rows(made, splits)
    tfds.folder_dataset.write_metadata(
        data_dir=str(rows_folder),
        features=features(made.config.model.n_positions, tokenizer.vocab_size),
        check_data=False,
        split_infos=[info for info in infos if info.shard_lengths],
    )
    manifest = {
        "format": FORMAT,
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "working_directory": os.getcwd(),
        "version": importlib.metadata.version("biomedlm_jax"),
        "settings": made.settings,
        "n_positions": made.config.model.n_positions,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer": made.config.data.tokenizer or "trained on this text",
        "tokenizer_sha256": tokenizer.fingerprint,
        "splits": splits,
        "dropped": _total_dropped(made),
        "replaced_surrogates": sum(result["replaced_surrogates"] for result in made.read),
        "contamination": made.contamination,
        "shards": [
            _describe(*of_shard) for of_shard in zip(made.shards, made.read, made.chosen, made.encoded, strict=True)
        ],
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
    card.write(manifest, folder)


def _finish_split(
    made: Prepared, split: str, work: Path, rows_folder: Path, tokenizer: Tokenizer
) -> tuple[dict[str, Any], tfds.core.SplitInfo]:
    """Puts the files of a split under TFDS's names; what the manifest and TFDS say of it."""
    parts = [result[split] for result in made.encoded]
    ends = work / f"ends.{split}"
    joined, left_over, padding = _join_ends(made, split, ends, tokenizer.vocab_size, tokenizer.eos_id)
    paths = [*(work / f"rows-{shard}.{split}" for shard in made.shards), ends]
    filled = [(part, path) for part, path in zip([*parts, joined], paths, strict=True) if part["rows"]]
    template = file_template(rows_folder, split)
    names = template.sharded_filepaths(len(filled)) if filled else []
    for (_, path), name in zip(filled, names, strict=True):
        _link(path, Path(str(name)))
    info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=[part["rows"] for part, _ in filled],
        num_bytes=sum(part["row_bytes"] for part, _ in filled),
        filename_template=template,
    )
    rows = sum(info.shard_lengths)
    counts = {
        "documents": sum(_count(part, "documents") for part in parts),
        "bytes": sum(_count(part, "bytes") for part in parts),
        "rows": rows,
        "tokens": rows * made.config.model.n_positions - padding,
        "tokens_left_over": left_over,
        "sha256": hashlib.sha256("".join(part["sha256"] for part, _ in filled).encode()).hexdigest(),
        "sources": _total_sources([part["sources"] for part in parts]),
        # Documents of 0, 1, 2 to 3, 4 to 7, ... tokens.
        "document_lengths": np.trim_zeros(np.sum([part["lengths"] for part in parts], axis=0), "b").tolist(),
        "files": [
            {"name": Path(str(name)).name, "rows": part["rows"], "bytes": part["file_bytes"], "sha256": part["sha256"]}
            for (part, _), name in zip(filled, names, strict=True)
        ],
    }
    if made.config.data.source == "synthetic":
        counts["entropy_nats"] = sum(
            result["entropy_nats"] for shard, result in zip(made.shards, made.read, strict=True) if shard.split == split
        )
    return counts, info


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name


def _join_ends(made: Prepared, split: str, path: Path, vocab_size: int, eos_id: int) -> tuple[dict[str, Any], int, int]:
    """Makes rows of what was left after each shard's last whole row.

    Returns:
      What `RowWriter.close` says, the ids that are in no row, and the ids added to fill the last one.
    """
    n_positions = made.config.model.n_positions
    ids = np.concatenate([np.asarray(result[split]["rest"], row_dtype(vocab_size)) for result in made.encoded])
    missing = -len(ids) % n_positions if split == "eval" else 0
    writer = RowWriter(path, n_positions, vocab_size)
    try:
        writer.write(np.pad(ids, (0, missing), constant_values=eos_id))
        part = writer.close()
    finally:
        writer.discard()
    return part, len(part["rest"]), missing


def _link(path: Path, target: Path) -> None:
    """A second name for a file, so that the work is whole until the folder is; a copy where there are no links."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _check_rows(made: Prepared, splits: dict[str, Any]) -> None:
    train, held_out, data = splits["train"], splits["eval"], made.config.data
    if not train["rows"]:
        raise UserError(
            f"the training text makes {train['tokens_left_over']} tokens, fewer than one row of model.n_positions "
            f"({made.config.model.n_positions})"
        )
    if data.eval_fraction and not held_out["rows"]:
        raise UserError(f"data.eval_fraction {data.eval_fraction} holds out none of {train['documents']} documents")


def _count(result: dict[str, Any], what: str) -> int:
    return sum(counts[what] for counts in result["sources"].values())


def _total_sources(parts: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, Counter[str]] = {}
    for part in parts:
        for source, counts in part.items():
            total.setdefault(source, Counter()).update(counts)
    return {source: dict(total[source]) for source in sorted(total)}


def _total_dropped(made: Prepared) -> dict[str, int]:
    total: Counter[str] = Counter()
    for result in (*made.read, *made.chosen):
        total.update(result["dropped"])
    return dict(sorted(total.items()))


def _describe(shard: Shard, read: dict[str, Any], chosen: dict[str, Any], encoded: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of a shard."""
    return {
        "setting": f"{shard.split}_files" if shard.files else "synthetic_documents",
        "files": list(shard.files) or [f"documents {shard.synthetic[0]} to {shard.synthetic[1] - 1}"],
        "file_count": len(shard.files),
        "file_bytes": shard.size if shard.files else 0,
        "documents": read["documents"],
        "bytes": read["bytes"],
        "documents_sha256": read["documents_sha256"],
        "replaced_surrogates": read["replaced_surrogates"],
        "dropped": read["dropped"] | chosen["dropped"],
        "samples": read["samples"] | chosen["samples"],
    } | {
        split: {
            "documents": _count(encoded[split], "documents"),
            "tokens": _count(encoded[split], "tokens"),
            "rows": encoded[split]["rows"],
            "sha256": encoded[split]["sha256"],
        }
        for split in SPLITS
    }


def log_summary(manifest: dict[str, Any]) -> None:
    """Says what was prepared."""
    for split, counts in manifest["splits"].items():
        logger.info(
            "rows: %s %d documents, %d tokens, %d rows of %d",
            split,
            counts["documents"],
            counts["tokens"],
            counts["rows"],
            manifest["n_positions"],
        )
    if manifest["dropped"]:
        logger.info(
            "rows: left out: %s", ", ".join(f"{count} {reason}" for reason, count in manifest["dropped"].items())
        )
    found = manifest["contamination"]
    for file, counts in found["files"].items() if found else ():
        outcomes = [
            f"{found[name][file]} are {what}"
            for name, what in (
                ("left_out", "left out"),
                ("kept", "kept for training (data.contaminated: report)"),
                ("held_out", "held out"),
            )
            if file in found[name]
        ]
        if outcomes:
            logger.warning(
                "rows: documents share words with the benchmark %s (%s, ...): %s",
                shown(file),
                found["samples"][file][0],
                ", ".join(outcomes),
            )
        if counts["records_without_texts"]:
            logger.warning(
                "rows: %d of the %d records of the benchmark %s were not looked for: they have no text of %d words",
                counts["records_without_texts"],
                counts["records"],
                shown(file),
                found["min_words"],
            )
