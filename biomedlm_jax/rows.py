"""Rows of token ids on disk: made from text once, read by any process in any order.

    DIR/manifest.json     what the rows were made from, their counts, what was dropped and why
    DIR/tokenizer/        what the text was encoded with
    DIR/rows/             ArrayRecord files registered as a TFDS data set: `tfds.builder_from_directory(DIR/rows)`

Documents are concatenated in the order they are read, each followed by the end-of-text id, and cut into rows of
n_positions ids. The training rows leave out the last, incomplete one; the held-out rows keep it, padded, since
every held-out token counts.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer, naming
from tqdm import tqdm

from biomedlm_jax import corpus, synthetic
from biomedlm_jax.config import Config, as_paths
from biomedlm_jax.corpus import Document, ReadReport
from biomedlm_jax.errors import UserError, reason
from biomedlm_jax.files import complete_folder, lock
from biomedlm_jax.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
_FORMAT = 2
_PREPARE_AGAIN = "delete the folder and prepare it again"
_DATASET = "biomedlm_rows"
_ROWS_PER_FILE = 1 << 16
_DOCUMENTS_PER_ENCODE = 256

# Settings that decide what the rows are.
_DATA_SETTINGS = {
    "synthetic": ("source", "synthetic_documents", "synthetic_eval_documents"),
    "pile": ("source", "train_files", "eval_files", "pile_sets"),
    "text": ("source", "train_files", "eval_files"),
}


@dataclasses.dataclass(frozen=True)
class Rows:
    """One split of prepared rows."""

    source: Sequence[dict[str, np.ndarray]]
    """Random access to {'tokens': [n_positions]}."""
    n_positions: int
    tokens: int
    """Ids before padding; fewer than len(source) * n_positions where the last row is padded."""
    fingerprint: str
    """Hash of the rows."""
    eos_id: int
    """Id that ends each document."""
    entropy: float | None = None
    """Nats a token that a perfect model of the text cannot do without; known of the synthetic text only."""

    def __len__(self) -> int:
        return len(self.source)


def pack_rows(documents: Iterable[Document], tokenizer: Tokenizer, n_positions: int) -> Iterator[np.ndarray]:
    """Rows of `n_positions` ids; the last may be shorter.

    Yields:
      Arrays of uint16, or uint32 where the vocabulary needs it, of shape [n_positions].
    """
    dtype = row_dtype(tokenizer.vocab_size)
    pending = np.empty(0, dtype)
    documents = iter(documents)
    while texts := [document.text for document in itertools.islice(documents, _DOCUMENTS_PER_ENCODE)]:
        parts = [pending]
        for ids in tokenizer.encode_batch(texts):
            parts += [np.asarray(ids, dtype), np.asarray([tokenizer.eos_id], dtype)]
        pending = np.concatenate(parts)
        whole = len(pending) // n_positions * n_positions
        yield from pending[:whole].reshape(-1, n_positions)
        pending = pending[whole:]
    if len(pending):
        yield pending


def row_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def ensure_prepared(config: Config) -> None:
    """Prepares the rows that a configuration asks for, unless they are there.

    Builds them under a temporary name, so that a folder is either complete or absent.

    Raises:
      UserError: the text cannot be read, has too many broken records or too little text, the tokenizer's
        vocabulary is not the model's, or the folder holds other rows than the configuration asks for.
    """
    folder = Path(os.path.abspath(config.prepared_dir))
    # Looked for before the lock, too: complete rows may lie where nothing can be written.
    if _is_prepared(config, folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    busy = functools.partial(logger.info, "rows: another process prepares %s; waiting for it", folder)
    with lock(folder.with_name(f".{folder.name}.lock"), busy):
        if _is_prepared(config, folder):
            return
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} exists and holds no prepared rows (no {MANIFEST_FILE}): choose another data.dir")
        logger.info("rows: %s has none yet; preparing them from data.source %s", folder, config.data.source)
        with complete_folder(folder) as partial:
            _prepare(config, partial)


def _is_prepared(config: Config, folder: Path) -> bool:
    if not (folder / MANIFEST_FILE).is_file():
        return False
    _check_manifest(config, read_manifest(folder), folder)
    logger.info("rows: using %s", folder)
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder of prepared rows holds."""
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no prepared rows (no {MANIFEST_FILE})") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {_PREPARE_AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise UserError(f"{path} is not of format {_FORMAT}, which this version reads: {_PREPARE_AGAIN}")
    needed = {"settings", "n_positions", "vocab_size", "eos_id", "tokenizer_sha256", "splits"}
    if missing := sorted(needed - manifest.keys()):
        raise UserError(f"{path} is damaged (it lacks {', '.join(missing)}): {_PREPARE_AGAIN}")
    return manifest


def open_rows(folder: Path, split: str) -> Rows | None:
    """The rows of split 'train' or 'eval'; None if the split is empty.

    Raises:
      UserError: files are missing, cut off, or not those that the manifest speaks of.
    """
    manifest = read_manifest(folder)
    counts = manifest["splits"][split]
    if not counts["rows"]:
        return None
    # TFDS and ArrayRecord raise what they like on files that are missing, empty or cut off.
    try:
        builder = tfds.builder_from_directory(str(folder / "rows"))
        source = builder.as_data_source(split)
        ends = np.cumsum(builder.info.splits[split].shard_lengths)
        for row in {0, *ends - 1, *ends[:-1]}:
            source[int(row)]
    except Exception as error:
        raise UserError(f"{folder / 'rows'} cannot be read ({reason(error)}): {_PREPARE_AGAIN}") from error
    if len(source) != counts["rows"]:
        raise UserError(
            f"{folder / 'rows'} has {len(source)} rows of {split}, its manifest says {counts['rows']}: {_PREPARE_AGAIN}"
        )
    entropy = counts["entropy_nats"] / counts["tokens"] if "entropy_nats" in counts else None
    return Rows(source, manifest["n_positions"], counts["tokens"], counts["sha256"], manifest["eos_id"], entropy)


def _settings(config: Config) -> dict[str, Any]:
    """The settings that decide what the rows are, as JSON would read them back."""
    values = {name: getattr(config.data, name) for name in _DATA_SETTINGS[config.data.source]}
    for name in ("train_files", "eval_files"):
        if name in values:
            values[name] = as_paths(values[name])
    return json.loads(json.dumps(values))


def _check_manifest(config: Config, manifest: dict[str, Any], folder: Path) -> None:
    have, want = manifest["settings"], _settings(config)
    # Rows prepared before may be used without saying again what from.
    unsaid = {name for name in ("train_files", "eval_files") if not want.get(name)}
    differing = [name for name in want if name not in unsaid and have.get(name) != want[name]]
    if differing:
        name = differing[0]
        raise UserError(
            f"{folder} was prepared with data.{name} {have.get(name)}, and this configuration has {want[name]}: "
            "choose another data.dir, or delete the folder to prepare it again"
        )
    if config.data.tokenizer and load_tokenizer(config.data.tokenizer).fingerprint != manifest["tokenizer_sha256"]:
        raise UserError(
            f"{folder} was prepared with another tokenizer than {config.data.tokenizer}: choose another "
            "data.dir, or delete the folder to prepare it again"
        )
    for name, here in (("n_positions", config.model.n_positions), ("vocab_size", config.model.vocab_size)):
        if manifest[name] != here:
            raise UserError(
                f"{folder} was prepared with model.{name} {manifest[name]}, and this configuration has {here}: "
                "choose another data.dir, or delete the folder to prepare it again"
            )


def _prepare(config: Config, folder: Path) -> None:
    data = config.data
    splits = {"train": as_paths(data.train_files), "eval": as_paths(data.eval_files)}
    files = {split: corpus.expand_globs(patterns) for split, patterns in splits.items()}
    if twice := sorted(set(files["train"]) & set(files["eval"])):
        raise UserError(f"{twice[0]} is in data.train_files and in data.eval_files")
    tokenizer = _tokenizer(config, files["train"], folder / "tokenizer")
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"the tokenizer {data.tokenizer} has {tokenizer.vocab_size} words, and model.vocab_size is "
            f"{config.model.vocab_size}: set model.vocab_size to {tokenizer.vocab_size}"
        )
    rows_folder = folder / "rows"
    rows_folder.mkdir()
    counts, infos = {}, []
    for split in splits:
        counts[split], info = _prepare_split(config, split, files[split], tokenizer, rows_folder)
        infos.append(info)
    tfds.folder_dataset.write_metadata(
        data_dir=str(rows_folder),
        features=_features(config.model.n_positions, tokenizer),
        check_data=False,
        split_infos=[info for info in infos if info.shard_lengths],
    )
    manifest = {
        "format": _FORMAT,
        "settings": _settings(config),
        "n_positions": config.model.n_positions,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.fingerprint,
        "splits": counts,
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    for split, count in counts.items():
        dropped = ", ".join(f"{number} {reason}" for reason, number in count["dropped"].items())
        logger.info(
            "rows: %s %d documents, %d tokens, %d rows of %d%s",
            split,
            count["documents"],
            count["tokens"],
            count["rows"],
            config.model.n_positions,
            f"; left out: {dropped}" if dropped else "",
        )


def _documents(config: Config, split: str, files: list[str], report: ReadReport) -> Iterator[Document]:
    data = config.data
    if data.source == "synthetic":
        for document in synthetic.documents(*_synthetic_range(config, split)):
            report.documents += 1
            report.bytes += len(document.text.encode())
            yield document
    else:
        yield from corpus.read_documents(data.source, files, report, data.pile_sets)


def _synthetic_range(config: Config, split: str) -> tuple[int, int]:
    # Held-out documents come after the training ones, whose knowledge they share.
    train, held_out = config.data.synthetic_documents, config.data.synthetic_eval_documents
    return (0, train) if split == "train" else (train, train + held_out)


def _tokenizer(config: Config, train_files: list[str], folder: Path) -> Tokenizer:
    """A copy of the tokenizer that was asked for, or one trained on the abstracts of the training text."""
    if config.data.tokenizer:
        tokenizer = load_tokenizer(config.data.tokenizer)
        tokenizer.save(folder)
        return tokenizer
    logger.info("tokenizer: training one of %d words", config.model.vocab_size)
    reports: list[ReadReport] = []

    def read() -> Iterator[Document]:
        reports.append(ReadReport())
        return _documents(config, "train", train_files, reports[-1])

    texts = corpus.tokenizer_texts(read)
    first = next(texts, None)
    if first is None:
        raise UserError(
            f"no text in data.train_files ({train_files[0]}, ...): left out are {dict(reports[-1].dropped)}; "
            f"data.pile_sets is {list(config.data.pile_sets)}"
        )
    return train_tokenizer(itertools.chain([first], texts), config.model.vocab_size, folder)


def _prepare_split(
    config: Config, split: str, files: list[str], tokenizer: Tokenizer, folder: Path
) -> tuple[dict[str, Any], tfds.core.SplitInfo]:
    """Writes the rows of one split, and says what they hold."""
    n_positions = config.model.n_positions
    report = ReadReport()
    documents = tqdm(
        _documents(config, split, files, report), desc=f"preparing {split} rows", unit=" documents", disable=None
    )
    writer = _SplitWriter(folder, split, _features(n_positions, tokenizer))
    tokens = left_over = 0
    for row in pack_rows(documents, tokenizer, n_positions):
        missing = n_positions - len(row)
        if missing and split == "train":
            left_over = len(row)
        else:
            writer.write(np.pad(row, (0, missing), constant_values=tokenizer.eos_id))
            tokens += len(row)
    info = writer.close()
    report.check(config.data.max_bad_fraction)
    if split == "eval" and files and not tokens:
        raise UserError(
            f"no text to evaluate on in data.eval_files ({files[0]}, ...): left out are {dict(report.dropped)}"
        )
    if split == "train" and not info.shard_lengths:
        raise UserError(
            f"the training text makes {left_over} tokens, fewer than one row of model.n_positions ({n_positions})"
        )
    counts = {
        "rows": sum(info.shard_lengths),
        "tokens": tokens,
        "tokens_left_over": left_over,
        "sha256": writer.digest.hexdigest(),
        "files": files,
    } | report.as_dict()
    if config.data.source == "synthetic":
        counts["entropy_nats"] = sum(
            synthetic.generate(index).entropy for index in range(*_synthetic_range(config, split))
        )
    return counts, info


def _features(n_positions: int, tokenizer: Tokenizer) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(
                shape=(n_positions,), dtype=row_dtype(tokenizer.vocab_size), encoding=tfds.features.Encoding.BYTES
            )
        }
    )


class _SplitWriter:
    """ArrayRecord files of one split, as TFDS would write them."""

    def __init__(self, folder: Path, split: str, features: tfds.features.FeaturesDict):
        self.digest = hashlib.sha256()
        self._split = split
        self._features = features
        self._serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
        self._template = naming.ShardedFileTemplate(
            data_dir=str(folder), dataset_name=_DATASET, split=split, filetype_suffix="array_record"
        )
        self._lengths: list[int] = []
        self._bytes = 0
        self._writer: Any = None

    def _temporary_path(self, index: int) -> Path:
        # The final name holds the number of files, which is known at the end.
        return Path(self._template.data_dir) / f"{self._split}-{index}.tmp"

    def write(self, row: np.ndarray) -> None:
        """Appends one row."""
        if self._writer is None or self._lengths[-1] == _ROWS_PER_FILE:
            self._close_file()
            # One row a group: rows are read in random order.
            path = self._temporary_path(len(self._lengths))
            self._writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            self._lengths.append(0)
        with _full_disk_named(path=self._template.data_dir):
            self._writer.write(self._serializer.serialize_example(self._features.encode_example({"tokens": row})))
        self.digest.update(row.tobytes())
        self._lengths[-1] += 1
        self._bytes += row.nbytes

    def _close_file(self) -> None:
        if self._writer is not None:
            with _full_disk_named(path=self._template.data_dir):
                self._writer.close()

    def close(self) -> tfds.core.SplitInfo:
        """Gives the files their names and describes them to TFDS."""
        self._close_file()
        if self._lengths:
            for index, path in enumerate(self._template.sharded_filepaths(len(self._lengths))):
                self._temporary_path(index).rename(str(path))
        return tfds.core.SplitInfo(
            name=self._split, shard_lengths=self._lengths, num_bytes=self._bytes, filename_template=self._template
        )


@contextlib.contextmanager
def _full_disk_named(path: Any) -> Iterator[None]:
    """Makes an OSError of ArrayRecord's RuntimeError about a full disk."""
    try:
        yield
    except RuntimeError as error:
        if "No space left" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
