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
import logging
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
from biomedlm_jax.tokenizer.base import id_code

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
FORMAT = 2
PREPARE_AGAIN = "delete the folder and prepare it again"
_DATASET = "biomedlm_rows"
_DOCUMENTS_PER_ENCODE = 256


@dataclasses.dataclass(frozen=True)
class Rows:
    """One split of prepared rows."""

    source: Sequence[dict[str, np.ndarray]]
    """Random access to {'tokens': [n_positions]}; where it has `__getitems__`, to many at once, which is faster."""
    n_positions: int
    tokens: int
    """Ids before padding; fewer than len(source) * n_positions where the last row is padded."""
    fingerprint: str
    """Hash of the rows."""
    eos_id: int
    """Id that ends each document."""
    entropy: float | None = None
    """Nats a token that a perfect model of the text cannot do without; known of the synthetic text only."""

    folder: Path | None = None
    """Where they lie; None of rows in memory."""
    files: dict[Path, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """Bytes and time of the last change (nanoseconds) of each file when it was opened, the manifest's included."""

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The ids of some rows, [len(indices), n_positions]; may be called by several threads.

        Raises:
          UserError: a file cannot be read any more.
        """
        read_many = getattr(self.source, "__getitems__", None)
        found = read_many(indices) if read_many else [self.source[index] for index in indices]
        return np.stack([row["tokens"] for row in found])

    def check_unchanged(self) -> None:
        """Compares the files with what they were when they were opened.

        By size and time, which every file system has, and not by inode, which some network file systems make up anew.
        A file system that does not answer for a moment has not changed.

        Raises:
          UserError: one is gone or was written since; names it.
        """
        for path, opened in self.files.items():
            try:
                found = _state(path)
            except FileNotFoundError:
                change = "is gone"
            except OSError as error:
                logger.warning("rows: cannot see whether %s has changed: %s", path, reason(error))
                continue
            else:
                if found == opened:
                    continue
                change = f"was {opened[0]:,} bytes and is {found[0]:,}" if found[0] != opened[0] else "was written"
            raise UserError(
                f"{path} {change} since this run began to read the rows of {self.folder}: what it learnt since its "
                "last checkpoint is not saved. Earlier checkpoints stay: put the rows back, and the same command "
                "goes on from the last one"
            )


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def pack_rows(documents: Iterable[Document], tokenizer: Tokenizer, n_positions: int) -> Iterator[np.ndarray]:
    """Rows of `n_positions` ids; the last may be shorter.

    Yields:
      Arrays of uint16, or uint32 where the vocabulary needs it, of shape [n_positions].
    """
    pending = np.empty(0, row_dtype(tokenizer.vocab_size))
    documents = iter(documents)
    while texts := [document.text for document in itertools.islice(documents, _DOCUMENTS_PER_ENCODE)]:
        whole, pending = _cut(pending, tokenizer.encode_array(texts), n_positions)
        yield from whole
    if len(pending):
        yield pending


def _cut(before: np.ndarray, ids: np.ndarray, n_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole rows of ids and those before them, [rows, n_positions], and the ids that are left."""
    ids = np.concatenate([before, ids])
    end = len(ids) // n_positions * n_positions
    return ids[:end].reshape(-1, n_positions), ids[end:]


def row_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds every id."""
    return np.dtype(id_code(vocab_size)).type


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
        info = builder.info.splits[split]
        files = {path: _state(path) for path in (folder / MANIFEST_FILE, *map(Path, info.filepaths))}
        source = _RowFiles([Path(path) for path in info.filepaths], info.shard_lengths, builder.info.features)
    except Exception as error:
        raise UserError(f"{folder / 'rows'} cannot be read ({reason(error)}): {PREPARE_AGAIN}") from error
    if len(source) != counts["rows"]:
        raise UserError(
            f"{folder / 'rows'} has {len(source)} rows of {split}, its manifest says {counts['rows']}: {PREPARE_AGAIN}"
        )
    for file in counts.get("files", ()):
        size = files.get(folder / "rows" / file["name"], (0, 0))[0]
        if size != file["bytes"]:
            raise UserError(
                f"{folder / 'rows'} is not what was prepared: {file['name']} has {size:,} bytes, and {MANIFEST_FILE} "
                f"says {file['bytes']:,}: {PREPARE_AGAIN}"
            )
    entropy = counts["entropy_nats"] / counts["tokens"] if "entropy_nats" in counts else None
    return Rows(
        source, manifest["n_positions"], counts["tokens"], counts["sha256"], manifest["eos_id"], entropy, folder, files
    )


class _RowFiles(Sequence[dict[str, np.ndarray]]):
    """The rows in ArrayRecord files: one after the other, or many at once, by any thread.

    TFDS's own data source takes 2.4 times as long one row after the other, and 3.7 times for many at once: it parses
    each record by what its features say, starts threads for each call, and reads 32 KiB for each row. Ours is right
    for a record whose ids are its last bytes, as TFDS writes them; whether they are is compared with TFDS on opening.
    """

    def __init__(self, paths: Sequence[Path], lengths: Sequence[int], row_features: Any):
        """Opens all files and reads the first and the last row of each, so that what is missing shows at once."""
        self._paths = paths
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths
        # As much as a row and what ArrayRecord has around it, for rows of a few KiB.
        options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 4096}
        self._readers = [array_record_module.ArrayRecordReader(str(path), **options) for path in paths]
        tensor = row_features["tokens"]
        self._dtype = np.dtype(tensor.np_dtype)
        self._row_bytes = int(np.prod(tensor.shape)) * self._dtype.itemsize
        for reader, length in zip(self._readers, lengths, strict=True):
            for record in reader.read([0, length - 1]):
                self._record_bytes = len(record)
                if self._decode(record).tobytes() != row_features.deserialize_example_np(record)["tokens"].tobytes():
                    raise ValueError("a record is not as TFDS writes it")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        files = np.searchsorted(self._ends, indices, side="right")
        found: list[Any] = [None] * len(files)
        for number in np.unique(files):
            places = np.flatnonzero(files == number)
            positions = (np.asarray(indices)[places] - self._starts[number]).tolist()
            try:
                records = self._readers[number].read(positions)
                for place, record in zip(places, records, strict=True):
                    found[place] = {"tokens": self._decode(record)}
            except Exception as error:  # ArrayRecord raises what it likes
                raise UserError(f"{self._paths[number]} cannot be read any more ({reason(error)})") from error
        return found

    def _decode(self, record: bytes) -> np.ndarray:
        if len(record) != self._record_bytes:
            raise ValueError(f"a record has {len(record)} bytes instead of {self._record_bytes}")
        return np.frombuffer(record, self._dtype, offset=len(record) - self._row_bytes)


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
        whole, self._pending = _cut(self._pending, ids, self._n_positions)
        self._digest.update(whole.tobytes())
        with _full_disk_named(self._path):
            for row in whole:
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
