"""The Pile's PubMed sets as a TFDS data set, for those who feed other programs with it.

    tfds build pile_pubmed --imports biomedlm_jax.corpus --manual_dir /data/pile --file_format array_record

`biomedlm_jax.prepare` reads the same files without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from biomedlm_jax.corpus import json_lines
from biomedlm_jax.corpus.records import Document, ReadReport, Selection

_SPLITS = {"train": ("train*", "train/*"), "validation": ("val*", "val*/*"), "test": ("test*", "test/*")}


class PilePubmed(tfds.core.ShardBasedBuilder):
    """PubMed Abstracts and PubMed Central of The Pile: 'text', and 'pile_set' with the set's name."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "The folder holds files of JSON lines in The Pile's layout, plain or under gzip or zstd: train/*, val*, test*. "
        "The Pile is no longer handed out by its makers."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="The PubMed sets of The Pile, one example a document, one shard a file.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "pile_set": tfds.features.Text()}),
            homepage="https://pile.eleuther.ai",
            citation="https://arxiv.org/abs/2101.00027",
        )

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Any]]:
        folder = Path(dl_manager.manual_dir)
        found = {
            split: sorted(str(path) for pattern in patterns for path in folder.glob(pattern) if path.is_file())
            for split, patterns in _SPLITS.items()
        }
        if not found["train"]:
            raise AssertionError(f"{folder} holds no training files. {self.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        return {split: [_Examples(file) for file in files] for split, files in found.items() if files}


class _Examples:
    """The examples of one file."""

    def __init__(self, file: str):
        self._file = file

    def __call__(self) -> Iterator[tuple[int, dict[str, str]]]:
        report = ReadReport()
        documents: Iterator[Document] = json_lines.read(self._file, report, Selection())
        yield from enumerate({"text": document.text, "pile_set": document.source} for document in documents)
        report.check(0.001)
