"""Whether what others prepare, or prepared before, is what a configuration asks for."""

import dataclasses
import functools
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from biomedlm_jax import corpus
from biomedlm_jax.config import Config, as_paths
from biomedlm_jax.errors import UserError
from biomedlm_jax.files import replace_file
from biomedlm_jax.preparation.shards import Shard
from biomedlm_jax.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_FILES = ("source", "train_files", "eval_files", "eval_fraction", "benchmark_files", "contaminated")
# Settings that decide what the rows are.
_DATA_SETTINGS = {
    "synthetic": ("source", "synthetic_documents", "synthetic_eval_documents"),
    "pile": (*_FILES, "pile_sets", "text_field"),
    "parquet": (*_FILES, "pile_sets", "text_field"),
    "pubmed_xml": (*_FILES, "languages"),
    "jats_xml": (*_FILES, "languages"),
    "text": _FILES,
}
_PATHS = ("train_files", "eval_files", "benchmark_files")
_OTHER_FOLDER = "choose another data.dir, or delete the folder to prepare it again"


def data_settings(config: Config) -> dict[str, Any]:
    """The settings that decide what the rows are, as JSON would read them back."""
    values = {name: getattr(config.data, name) for name in _DATA_SETTINGS[config.data.source]}
    for name in _PATHS:
        if name in values:
            values[name] = as_paths(values[name])
    return json.loads(json.dumps(values))


# ---- With rows that were prepared before


def check_manifest(config: Config, manifest: dict[str, Any], folder: Path) -> None:
    """Warns if the text has other files by now than the rows were made from.

    Raises:
      UserError: the rows of a folder are not those that a configuration asks for.
    """
    have, want = manifest["settings"], data_settings(config)
    # Rows prepared before may be used without saying again what from.
    unsaid = {name for name in _PATHS if not want.get(name)}
    if not want.get("train_files"):
        unsaid |= {"eval_fraction", "contaminated"}
    if not want.get("benchmark_files") and not have.get("benchmark_files"):
        unsaid.add("contaminated")
    differing = [name for name in want if name not in unsaid and have.get(name) != want[name]]
    if differing:
        name = differing[0]
        raise UserError(
            f"{folder} was prepared with data.{name} {have.get(name)}, and this configuration has {want[name]}: "
            f"{_OTHER_FOLDER}"
        )
    if config.data.tokenizer and load_tokenizer(config.data.tokenizer).fingerprint != manifest["tokenizer_sha256"]:
        raise UserError(f"{folder} was prepared with another tokenizer than {config.data.tokenizer}: {_OTHER_FOLDER}")
    for name, here in (("n_positions", config.model.n_positions), ("vocab_size", config.model.vocab_size)):
        if manifest[name] != here:
            raise UserError(
                f"{folder} was prepared with model.{name} {manifest[name]}, and this configuration has {here}: "
                f"{_OTHER_FOLDER}"
            )
    _compare_files(want, manifest, folder)


def _compare_files(want: dict[str, Any], manifest: dict[str, Any], folder: Path) -> None:
    """Rows stay valid when their text changes, but whoever changed it may not expect the old ones."""
    for setting in ("train_files", "eval_files"):
        patterns = want.get(setting, [])
        # Asking a server at each start would take long.
        if not patterns or any("://" in pattern for pattern in patterns):
            continue
        shards = [shard for shard in manifest["shards"] if shard["setting"] == setting]
        try:
            then = {corpus.real_path(file) for shard in shards for file in shard["files"]}
            now = {corpus.real_path(file): corpus.file_size(file) for file in corpus.expand_globs(patterns)}
        except UserError:
            continue  # it is not here any more, or not on this host
        changed = sorted(then ^ now.keys()) or [
            shard["files"][0]
            for shard in shards
            if shard["file_bytes"] != sum(now[corpus.real_path(file)] for file in shard["files"])
        ]
        if changed:
            logger.warning(
                "rows: the files of data.%s are not those that %s was prepared from: %s was added, taken away or "
                "changed (and %d more); the rows stay as they were: %s",
                setting,
                folder,
                corpus.shown(changed[0]),
                len(changed) - 1,
                _OTHER_FOLDER,
            )


# ---- With those who prepare now


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be prepared."""

    config: Config
    folder: Path
    """Where the rows are to be."""
    work: Path
    """Where unfinished work lies."""
    inputs: list[Shard]
    benchmark_files: tuple[str, ...]

    def begin(self) -> None:
        """Writes down what is prepared, for those who want to share the work."""
        if not self.work.exists():
            logger.info(
                "rows: preparing them from data.source %s; unfinished work lies in %s",
                self.config.data.source,
                self.work,
            )
        self.work.mkdir(exist_ok=True)
        replace_file(self._file, json.dumps(self._wanted).encode())

    def has_begun(self) -> bool:
        """Whether this is what was begun last; false if nothing was.

        Raises:
          UserError: it is something else.
        """
        try:
            begun = json.loads(self._file.read_bytes())
        except FileNotFoundError:
            return False
        for name, value in self._wanted.items():
            if name != "inputs" and begun.get(name) != value:
                raise UserError(
                    f"another process prepares these rows with {name} {begun.get(name)}, and this configuration has "
                    f"{value}: wait for it to end, or choose another data.dir"
                )
        here, there = self._wanted["inputs"], begun.get("inputs", {})
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                raise UserError(
                    f"another process prepares these rows from other files: {name}, or one read with it, was added, "
                    "taken away or changed since, or has another time on the other host: wait for it to end, and "
                    "start the same command again"
                )
        return True

    @property
    def _file(self) -> Path:
        return self.work / "settings.json"

    @functools.cached_property
    def _wanted(self) -> dict[str, Any]:
        tokenizer = self.config.data.tokenizer
        inputs = {shard.name: shard.key for shard in self.inputs}
        return data_settings(self.config) | {
            "n_positions": self.config.model.n_positions,
            "vocab_size": self.config.model.vocab_size,
            "tokenizer": load_tokenizer(tokenizer).fingerprint if tokenizer else "",
            "inputs": inputs | _identities(self.benchmark_files),
        }


def _identities(files: Iterable[str]) -> dict[str, str]:
    return {corpus.shown(file): corpus.file_identity(file) for file in files}
