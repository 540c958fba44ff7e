"""Rows of token ids on disk: made from text once, by `preparation`, read by any process in any order.

    DIR/manifest.json     what the rows were made from, their counts, what was dropped and why
    DIR/README.md         the same for people: a data card
    DIR/tokenizer/        what the text was encoded with
    DIR/rows/             ArrayRecord files registered as a TFDS data set: `tfds.builder_from_directory(DIR/rows)`

Documents are concatenated in the order they are read, each followed by the end-of-text id, and cut into rows of
n_positions ids. The training rows leave out the last, incomplete one; the held-out rows keep it, padded, since
every held-out token counts.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer, naming

from biomedlm_jax.corpus import Document
from biomedlm_jax.errors import UserError, reason
from biomedlm_jax.tokenizer import Tokenizer

MANIFEST_FILE = "manifest.json"
FORMAT = 2
PREPARE_AGAIN = "delete the folder and prepare it again"
_DATASET = "biomedlm_rows"
_DOCUMENTS_PER_ENCODE = 256


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
    pending = np.empty(0, row_dtype(tokenizer.vocab_size))
    documents = iter(documents)
    while texts := [document.text for document in itertools.islice(documents, _DOCUMENTS_PER_ENCODE)]:
        pending = np.concatenate([pending, tokenizer.encode_array(texts)])
        whole = len(pending) // n_positions * n_positions
        yield from pending[:whole].reshape(-1, n_positions)
        pending = pending[whole:]
    if len(pending):
        yield pending


def row_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder of prepared rows holds."""
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no prepared rows (no {MANIFEST_FILE})") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {PREPARE_AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}, which this version reads: {PREPARE_AGAIN}")
    needed = {"settings", "n_positions", "vocab_size", "eos_id", "tokenizer_sha256", "splits"}
    if missing := sorted(needed - manifest.keys()):
        raise UserError(f"{path} is damaged (it lacks {', '.join(missing)}): {PREPARE_AGAIN}")
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
        raise UserError(f"{folder / 'rows'} cannot be read ({reason(error)}): {PREPARE_AGAIN}") from error
    if len(source) != counts["rows"]:
        raise UserError(
            f"{folder / 'rows'} has {len(source)} rows of {split}, its manifest says {counts['rows']}: {PREPARE_AGAIN}"
        )
    entropy = counts["entropy_nats"] / counts["tokens"] if "entropy_nats" in counts else None
    return Rows(source, manifest["n_positions"], counts["tokens"], counts["sha256"], manifest["eos_id"], entropy)


def features(n_positions: int, vocab_size: int) -> tfds.features.FeaturesDict:
    """What a row is to TFDS."""
    return tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(
                shape=(n_positions,), dtype=row_dtype(vocab_size), encoding=tfds.features.Encoding.BYTES
            )
        }
    )


def file_template(folder: Path, split: str) -> naming.ShardedFileTemplate:
    """How TFDS names the files of a split."""
    return naming.ShardedFileTemplate(
        data_dir=str(folder), dataset_name=_DATASET, split=split, filetype_suffix="array_record"
    )


class RowWriter:
    """One ArrayRecord file, as TFDS would write it; complete when it is there. Without rows there is none."""

    def __init__(self, path: Path, n_positions: int, vocab_size: int):
        self._path, self._n_positions = path, n_positions
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._features = features(n_positions, vocab_size)
        self._serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())
        self._pending = np.empty(0, row_dtype(vocab_size))
        self._digest = hashlib.sha256()
        self._rows = 0
        self._writer: Any = None

    def write(self, ids: np.ndarray) -> None:
        """Appends ids, of which whole rows are written."""
        ids = np.concatenate([self._pending, ids])
        whole = len(ids) // self._n_positions * self._n_positions
        self._pending = ids[whole:]
        self._digest.update(ids[:whole].tobytes())
        with _full_disk_named(self._path):
            for row in ids[:whole].reshape(-1, self._n_positions):
                # One row a group: rows are read in random order.
                self._writer = self._writer or array_record_module.ArrayRecordWriter(str(self._partial), "group_size:1")
                self._writer.write(self._serializer.serialize_example(self._features.encode_example({"tokens": row})))
                self._rows += 1

    def close(self) -> dict[str, Any]:
        """Gives the file its name.

        Returns:
          'rows'; 'row_bytes', of their ids; 'file_bytes'; 'sha256' of the ids; and 'rest', the ids after the last
          whole row.
        """
        size = 0
        if self._writer:
            with _full_disk_named(self._path):
                self._writer.close()
            self._writer = None
            size = self._partial.stat().st_size
            self._partial.replace(self._path)
        return {
            "rows": self._rows,
            "row_bytes": self._rows * self._n_positions * self._pending.itemsize,
            "file_bytes": size,
            "sha256": self._digest.hexdigest(),
            "rest": self._pending.tolist(),
        }

    def discard(self) -> None:
        """Removes what was written, if it was not closed."""
        if self._writer:
            with contextlib.suppress(RuntimeError):
                self._writer.close()
            self._partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _full_disk_named(path: Any) -> Iterator[None]:
    """Makes an OSError of ArrayRecord's RuntimeError about a full disk."""
    try:
        yield
    except RuntimeError as error:
        if "No space left" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
