"""What becomes of each document: training rows, held-out rows, or left out and why. From the indexes of all shards."""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from biomedlm_jax.config import DataConfig
from biomedlm_jax.contamination import Benchmarks
from biomedlm_jax.corpus import MAX_SAMPLES, shown
from biomedlm_jax.errors import UserError
from biomedlm_jax.preparation.shards import SPLITS, Shard, load_choice, load_index, save_array

logger = logging.getLogger(__name__)

TRAIN, EVAL = range(len(SPLITS))
# Then the reasons to leave a document out, by number.
REASONS = ("train", "eval", "duplicate", "in held-out text", "contaminated", "older version", "deleted")
DUPLICATE, IN_HELD_OUT, CONTAMINATED, OLDER, DELETED = range(2, len(REASONS))


@dataclasses.dataclass(frozen=True)
class Indexes:
    """The documents of all shards, one after the other."""

    shards: Sequence[Shard]
    results: Sequence[dict[str, Any]]
    """What `shards.index` returned of each."""
    entries: np.ndarray
    """Of type `shards.INDEX`."""
    starts: np.ndarray
    """The place of each shard's first document, and the number of all."""

    @classmethod
    def load(cls, shards: Sequence[Shard], results: Sequence[dict[str, Any]], folder: Path) -> "Indexes":
        """Reads what `shards.index` wrote."""
        arrays = [load_index(shard, folder) for shard in shards]
        starts = np.cumsum([0, *map(len, arrays)])
        return cls(shards, results, np.concatenate(arrays), starts)

    def name(self, place: int) -> str:
        """Where a document is, for people: its file and its number there, from 1."""
        number = int(np.searchsorted(self.starts, place, "right")) - 1
        return _name(self.shards[number], self.results[number], int(place - self.starts[number]))


def _name(shard: Shard, result: dict[str, Any], ordinal: int) -> str:
    if not shard.files:
        return f"document {shard.synthetic[0] + ordinal}"
    ends = np.cumsum(result["file_documents"])
    file = int(np.searchsorted(ends, ordinal, "right"))
    return f"{shown(shard.files[file])}: document {ordinal - int(ends[file - 1] if file else 0) + 1}"


def choose(data: DataConfig, indexes: Indexes) -> np.ndarray:
    """What becomes of each document, a number of `REASONS`.

    In this order: PubMed's deletions and older versions fall; training documents that share words with benchmarks
    fall, if so configured; documents are held out by file or by hash; those of training text that are in held-out
    text fall; of equal texts the first stays.

    Raises:
      UserError: all documents of a held-out file are in training text.
    """
    entries, shards = indexes.entries, indexes.shards
    lengths = np.diff(indexes.starts)
    shard_of = np.repeat(np.arange(len(shards)), lengths)
    held_out_file = np.repeat([shard.split == "eval" for shard in shards], lengths)
    choice = np.where(held_out_file, EVAL, TRAIN).astype(np.uint8)
    if data.source == "pubmed_xml":
        _resolve_versions(indexes, shard_of, choice)
    if data.contaminated == "drop":
        for number, result in enumerate(indexes.results):
            places = indexes.starts[number] + np.array([place for place, _ in result["contaminated"]], np.int64)
            choice[places] = np.where(choice[places] == TRAIN, CONTAMINATED, choice[places])
    if data.eval_fraction:
        held_out = entries["hash"] < np.uint64(data.eval_fraction * 2**64)
        choice[(choice == TRAIN) & held_out] = EVAL
    for split in (EVAL, TRAIN):
        places = np.flatnonzero(choice == split)
        _, firsts = np.unique(entries["hash"][places], return_index=True)
        again = np.ones(len(places), bool)
        again[firsts] = False
        choice[places[again]] = DUPLICATE
    both = (choice == TRAIN) & np.isin(entries["hash"], entries["hash"][choice == EVAL])
    if both.any():
        _check_held_out(indexes, choice, np.flatnonzero(both))
        choice[both] = IN_HELD_OUT
    return choice


def _resolve_versions(indexes: Indexes, shard_of: np.ndarray, choice: np.ndarray) -> None:
    """Leaves the highest version of each PMID, of equal ones the last; a file deletes what it and earlier ones hold.

    NLM numbers its files, so their names tell which is earlier, whatever folders they lie in.
    """
    names = [f"{PurePath(shard.files[0]).name}\0{shard.number:09}" for shard in indexes.shards]
    order_of_files = np.argsort(np.array(names))
    ranks = np.argsort(order_of_files)
    rank = ranks[shard_of]
    pmid, version = indexes.entries["pmid"], indexes.entries["version"]

    last_deletion: dict[int, int] = {}
    for number in order_of_files:
        for deleted in indexes.results[number]["deleted"]:
            last_deletion[deleted] = int(ranks[number])
    if last_deletion:
        known = np.array(sorted(last_deletion), np.int64)
        until = np.array([last_deletion[deleted] for deleted in known], np.int64)
        slot = np.minimum(np.searchsorted(known, pmid), len(known) - 1)
        choice[(known[slot] == pmid) & (rank <= until[slot]) & (pmid > 0)] = DELETED

    places = np.flatnonzero((pmid > 0) & (choice != DELETED))
    order = places[np.lexsort((places, rank[places], version[places], pmid[places]))]
    superseded = np.zeros(len(order), bool)
    superseded[:-1] = pmid[order][1:] == pmid[order][:-1]
    choice[order[superseded]] = OLDER


def _check_held_out(indexes: Indexes, choice: np.ndarray, both: np.ndarray) -> None:
    """Says loudly which files hold the same text; refuses a held-out file that is in training text as a whole."""
    hashes = indexes.entries["hash"]
    places = dict(zip(hashes[both].tolist(), both.tolist(), strict=True))
    for number, shard in enumerate(indexes.shards):
        if shard.split != "eval":
            continue
        start, end = int(indexes.starts[number]), int(indexes.starts[number + 1])
        found = np.isin(hashes[start:end], hashes[both])
        if not found.any():
            continue
        twin = indexes.name(places[int(hashes[start + int(np.argmax(found))])])
        file = indexes.name(start + int(np.argmax(found)))
        if found.all():
            raise UserError(
                f"all {end - start} documents of data.eval_files {shard.name} are in data.train_files, too "
                f"({file} is {twin}): take one of them out"
            )
        logger.warning(
            "rows: %d documents of data.eval_files %s are in data.train_files, too (%s is %s): they are left out of "
            "the training rows",
            found.sum(),
            shard.name,
            file,
            twin,
        )


def write_choice(data: DataConfig, indexes: Indexes, folder: Path) -> list[dict[str, Any]]:
    """Writes choice-NUMBER.npy of each shard.

    Returns:
      For each shard 'dropped', numbers by reason, and 'samples' of them; both besides those of its reader.
    """
    choice = choose(data, indexes)
    kept = np.flatnonzero(choice <= EVAL)
    kept = kept[np.argsort(indexes.entries["hash"][kept])]
    kept_hashes = indexes.entries["hash"][kept]
    results = []
    for number, shard in enumerate(indexes.shards):
        start, end = indexes.starts[number], indexes.starts[number + 1]
        part = choice[start:end]
        save_array(folder / f"choice-{shard}.npy", part)
        counts = Counter(part[part > EVAL].tolist())
        results.append(
            {
                "dropped": {REASONS[reason]: count for reason, count in sorted(counts.items())},
                "samples": {
                    REASONS[reason]: [
                        _explain(indexes, reason, int(start + place), kept, kept_hashes)
                        for place in np.flatnonzero(part == reason)[:MAX_SAMPLES]
                    ]
                    for reason in sorted(counts)
                },
                "abstract_bytes": int(_kept_bytes(indexes, choice, start, end, abstracts=True)),
                "train_bytes": int(_kept_bytes(indexes, choice, start, end, abstracts=False)),
            }
        )
    return results


def _kept_bytes(indexes: Indexes, choice: np.ndarray, start: int, end: int, abstracts: bool) -> int:
    entries = indexes.entries[start:end]
    kept = choice[start:end] == TRAIN
    return entries["bytes"][kept & entries["abstract"] if abstracts else kept].sum()


def _explain(indexes: Indexes, reason: int, place: int, kept: np.ndarray, kept_hashes: np.ndarray) -> str:
    """Where a document is that was left out, and for which of those that were kept."""
    if reason not in (DUPLICATE, IN_HELD_OUT):
        return indexes.name(place)
    same = kept[np.searchsorted(kept_hashes, indexes.entries["hash"][place])]
    return f"{indexes.name(place)}, the same as {indexes.name(int(same))}"


def contamination_report(
    shards: Sequence[Shard], results: Sequence[dict[str, Any]], benchmarks: Benchmarks, folder: Path
) -> dict[str, Any]:
    """What became of documents that share words with benchmarks, by the choice in `folder`.

    Returns:
      By benchmark file: 'left_out', 'kept' for training, and 'held_out' documents, those left out for other reasons
      not counted; 'samples' of all three; and what `Benchmarks.report` says.
    """
    outcomes = {CONTAMINATED: "left_out", TRAIN: "kept", EVAL: "held_out"}
    counts: dict[str, Counter[str]] = {outcome: Counter() for outcome in outcomes.values()}
    samples: dict[str, list[str]] = {}
    for shard, result in zip(shards, results, strict=True):
        if not result["contaminated"]:
            continue
        choice = load_choice(shard, folder)
        for place, texts in result["contaminated"]:
            if choice[place] not in outcomes:
                continue
            for file in sorted({benchmarks.texts[text].file for text in texts}):
                counts[outcomes[choice[place]]][file] += 1
                if len(samples.setdefault(file, [])) < MAX_SAMPLES:
                    text = next(text for text in texts if benchmarks.texts[text].file == file)
                    samples[file].append(f"{shown(benchmarks.texts[text].place)} in {_name(shard, result, place)}")
    return json.loads(json.dumps(counts | {"samples": samples} | benchmarks.report()))
