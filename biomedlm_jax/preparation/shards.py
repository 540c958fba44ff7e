"""What is done to one input shard: index its documents, sample them for a tokenizer, encode them into rows."""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biomedlm_jax import contamination, corpus, synthetic
from biomedlm_jax.config import DataConfig, as_paths
from biomedlm_jax.corpus import Document, ReadReport, Selection
from biomedlm_jax.errors import UserError
from biomedlm_jax.files import replace_file
from biomedlm_jax.preparation import tasks
from biomedlm_jax.preparation.tasks import Advance
from biomedlm_jax.rows import RowWriter
from biomedlm_jax.tokenizer import load_tokenizer

# What is known of a document without its text. PMID 0 is none.
INDEX = np.dtype([("hash", "<u8"), ("bytes", "<u4"), ("pmid", "<i8"), ("version", "<i4"), ("abstract", "?")])
SPLITS = ("train", "eval")
# Files of one document each are put together up to this size, so that there are not millions of shards.
_SHARD_BYTES = 64 << 20
_SINGLE_DOCUMENT_SOURCES = ("text", "jats_xml")
_SYNTHETIC_DOCUMENTS = 10_000
_SYNTHETIC_BYTES = 1_400  # of a document, about
# A batch ends with the document that makes it this long: bounds memory.
_BATCH_BYTES = 4 << 20
_ABSTRACTS = ("PubMed Abstracts",)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Input that becomes one output file a split."""

    number: int
    split: str
    """Which setting names it: data.train_files or data.eval_files."""
    source: str
    files: tuple[str, ...]
    identities: tuple[str, ...]
    """Change when a file is replaced."""
    size: int
    """Bytes of the files."""
    selection: Selection
    synthetic: tuple[int, int] = (0, 0)
    """Documents of source synthetic: the first, and one past the last."""

    def __str__(self) -> str:
        return f"{self.number:05}"

    @property
    def name(self) -> str:
        """Its first file, as messages show it, or document."""
        return corpus.shown(self.files[0]) if self.files else f"document {self.synthetic[0]}"

    @property
    def key(self) -> str:
        """Hash of all that its documents depend on."""
        return digest(dataclasses.asdict(self))

    def read(self, report: ReadReport, advance: Advance) -> Iterator[tuple[int, Document]]:
        """Its documents, each with the number of its file."""
        if self.source == "synthetic":
            for document in synthetic.documents(*self.synthetic):
                report.documents += 1
                report.bytes += len(document.text.encode())
                advance(_SYNTHETIC_BYTES)
                yield 0, document
            return
        with tasks.reading(report, advance) as tell:
            for number, file in enumerate(self.files):
                for document in corpus.read_documents(self.source, [file], report, self.selection):
                    yield number, document
                    tell()


def digest(value: Any) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def input_shards(data: DataConfig, benchmark_files: Sequence[str]) -> list[Shard]:
    """The input that a configuration names, training text first.

    Raises:
      UserError: a pattern matches no file, or a file is training text and held out or a benchmark as well.
    """
    if data.source == "synthetic":
        # Held-out documents come after the training ones, whose knowledge they share.
        end = data.synthetic_documents + data.synthetic_eval_documents
        ranges = [
            (split, start, min(start + _SYNTHETIC_DOCUMENTS, stop))
            for split, begin, stop in (("train", 0, data.synthetic_documents), ("eval", data.synthetic_documents, end))
            for start in range(begin, stop, _SYNTHETIC_DOCUMENTS)
        ]
        return [
            Shard(
                number,
                split,
                data.source,
                (),
                (),
                (stop - start) * _SYNTHETIC_BYTES,
                Selection(),
                synthetic=(start, stop),
            )
            for number, (split, start, stop) in enumerate(ranges)
        ]
    files = {split: corpus.expand_globs(as_paths(getattr(data, f"{split}_files"))) for split in SPLITS}
    for name, others in (("eval", files["eval"]), ("benchmark", benchmark_files)):
        real = set(map(corpus.real_path, others))
        if twice := next((file for file in files["train"] if corpus.real_path(file) in real), None):
            raise UserError(f"{corpus.shown(twice)} is in data.train_files and in data.{name}_files")
    selection = Selection(tuple(data.pile_sets), data.text_field, tuple(data.languages))
    sizes = {file: corpus.file_size(file) for split in SPLITS for file in files[split]}
    groups = [(split, group) for split in SPLITS for group in _groups(data.source, files[split], sizes)]
    return [
        Shard(
            number,
            split,
            data.source,
            tuple(group),
            tuple(map(corpus.file_identity, group)),
            sum(map(sizes.__getitem__, group)),
            selection,
        )
        for number, (split, group) in enumerate(groups)
    ]


def _groups(source: str, files: Sequence[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    if source not in _SINGLE_DOCUMENT_SOURCES:
        yield from ([file] for file in files)
        return
    group: list[str] = []
    size = 0
    for file in files:
        if group and size + sizes[file] > _SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(file)
        size += sizes[file]
    if group:
        yield group


def text_hash(text: bytes) -> int:
    """The first 8 bytes of BLAKE2b: among 100 million documents, one chance in 3,700 that any two collide."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _batches(read: Iterator[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Documents in their order, not many bytes of them at once."""
    batch: list[tuple[int, Document]] = []
    size = 0
    for item in read:
        batch.append(item)
        size += len(item[1].text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- 1: index


def index(shard: Shard, benchmark_files: tuple[str, ...], folder: Path, advance: Advance) -> dict[str, Any]:
    """Writes index-NUMBER.npy, an array of `INDEX`; returns what was read and what was left out.

    Returns:
      ReadReport's numbers; 'file_documents', documents of each file; 'deleted', PMIDs; 'contaminated', the places of
      documents that share words with benchmarks, each with the numbers of the texts; 'entropy_nats' of synthetic text.
    """
    report = ReadReport()
    benchmarks = read_benchmarks(benchmark_files) if benchmark_files and shard.split == "train" else None
    entries: list[tuple[int, int, int, int, bool]] = []
    file_documents: Counter[int] = Counter()
    contaminated: list[tuple[int, list[int]]] = []
    for batch in _batches(shard.read(report, advance)):
        if benchmarks:
            found = enumerate(benchmarks.find_all([document.text for _, document in batch]), len(entries))
            contaminated += [(place, texts) for place, texts in found if texts]
        for number, document in batch:
            text = document.text.encode()
            abstract = document.source in _ABSTRACTS
            entries.append((text_hash(text), len(text), document.pmid, document.version, abstract))
            file_documents[number] += 1
    array = np.array(entries, INDEX)
    save_array(folder / f"index-{shard}.npy", array)
    result = report.as_dict() | {
        "file_documents": [file_documents[number] for number in range(max(1, len(shard.files)))],
        "documents_sha256": hashlib.sha256(array["hash"].tobytes()).hexdigest(),
        "deleted": report.deleted,
        "contaminated": contaminated,
    }
    if shard.source == "synthetic":
        result["entropy_nats"] = sum(synthetic.generate(number).entropy for number in range(*shard.synthetic))
    return result


def read_benchmarks(files: tuple[str, ...]) -> contamination.Benchmarks:
    """`contamination.read_benchmarks`, once a process, unless a file has changed."""
    return _read_benchmarks(files, tuple(map(corpus.file_identity, files)))


@functools.lru_cache(1)
def _read_benchmarks(files: tuple[str, ...], identities: tuple[str, ...]) -> contamination.Benchmarks:
    return contamination.read_benchmarks(files)


def load_index(shard: Shard, folder: Path) -> np.ndarray:
    """What `index` wrote."""
    return np.load(folder / f"index-{shard}.npy")


def load_choice(shard: Shard, folder: Path) -> np.ndarray:
    """What was decided of each document: numbers of `choice.REASONS`."""
    return np.load(folder / f"choice-{shard}.npy")


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an array that is complete when it is there."""
    content = io.BytesIO()
    np.save(content, array)
    replace_file(path, content.getvalue())


def _chosen(shard: Shard, folder: Path, advance: Advance) -> Iterator[tuple[int, Document]]:
    """All documents, each with what was decided of it.

    Raises:
      UserError: the text is not what was indexed.
    """
    hashes, choice = load_index(shard, folder)["hash"], load_choice(shard, folder)
    names = ", ".join(map(corpus.shown, shard.files[:3]))
    changed = UserError(f"{names} changed while rows were prepared from it: start the same command again")
    position = -1
    for position, (_, document) in enumerate(shard.read(ReadReport(), advance)):
        if position >= len(hashes) or text_hash(document.text.encode()) != hashes[position]:
            raise changed
        yield int(choice[position]), document
    if position + 1 != len(hashes):
        raise changed


# ---- 3: sample


def sample(shard: Shard, folder: Path, abstracts_only: bool, fraction: float, advance: Advance) -> dict[str, Any]:
    """Writes sample-NUMBER.jsonl, a fraction of the training documents to train a tokenizer on, chosen by hash."""
    path = folder / f"sample-{shard}.jsonl"
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        for choice, document in _chosen(shard, folder, advance):
            if choice != SPLITS.index("train") or (abstracts_only and document.source not in _ABSTRACTS):
                continue
            # Other bits than those that hold documents out.
            if text_hash(document.text.encode()) % (1 << 32) < fraction * (1 << 32):
                file.write(json.dumps(document.text) + "\n")
    partial.replace(path)
    return {}


# ---- 4: encode


def encode(shard: Shard, folder: Path, tokenizer_folder: Path, n_positions: int, advance: Advance) -> dict[str, Any]:
    """Writes the rows of one shard to rows-NUMBER.SPLIT.

    Returns:
      For each split what `RowWriter.close` says, and 'sources': documents, bytes and tokens by source.
    """
    tokenizer = _worker_tokenizer(tokenizer_folder)
    writers = {
        split: RowWriter(folder / f"rows-{shard}.{split}", n_positions, tokenizer.vocab_size) for split in SPLITS
    }
    sources: dict[str, dict[str, Counter[str]]] = {split: {} for split in SPLITS}
    lengths = {split: Counter[int]() for split in SPLITS}
    try:
        for batch in _batches(_chosen(shard, folder, advance)):
            for number, split in enumerate(SPLITS):
                documents = [document for choice, document in batch if choice == number]
                ids = tokenizer.encode_array([document.text for document in documents])
                writers[split].write(ids)
                ends = np.flatnonzero(ids == tokenizer.eos_id)
                for document, tokens in zip(documents, np.diff(ends, prepend=-1).tolist(), strict=True):
                    counts = sources[split].setdefault(document.source, Counter())
                    counts.update(documents=1, bytes=len(document.text.encode()), tokens=tokens)
                    lengths[split][tokens.bit_length()] += 1
        return {
            split: writers[split].close()
            | {"sources": sources[split], "lengths": [lengths[split][bits] for bits in range(32)]}
            for split in SPLITS
        }
    finally:
        for writer in writers.values():
            writer.discard()


@functools.lru_cache(1)
def _worker_tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


def sampled_texts(shards: Sequence[Shard], folder: Path) -> Iterator[str]:
    """What `sample` wrote, in the order of the shards."""
    lines = itertools.chain.from_iterable((folder / f"sample-{shard}.jsonl").open() for shard in shards)
    return map(json.loads, lines)
