"""Several folders of prepared rows read as one: which row each draw takes, and what has to fit together.

Draws are numbered from 0 for the whole run, and step s takes draws s * batch and on. Of the first n draws each set gets
its share to within a few rows, for every n; so each batch holds all sets in the proportions of their weights. The
draws of a set run through permutations of its rows, one after the other: an epoch is one of a set, in which each of
its rows is drawn once, and a set with a weight above its share of the rows comes to its second epoch earlier. A single
folder is a mixture of one.
"""

import dataclasses
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from biomedlm_jax import rows
from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError
from biomedlm_jax.rows import Rows
from biomedlm_jax.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

# Weights are rounded to this fraction of their sum, so that draws are counted in integers.
_RESOLUTION = 1 << 32


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sets of rows and their weights, which add up to 1."""

    sets: tuple[Rows, ...]
    weights: tuple[float, ...]

    def draws(self, seed: int) -> grain.MapDataset[tuple[int, int]]:
        """An endless sequence of (set, row): random access in O(1) time and memory.

        Each set is permuted anew each epoch, by Grain, seeded by (seed, place of the set, epoch).
        """
        if len(self.sets) == 1:
            return _permuted(0, self.sets[0], seed)
        seeds = [int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) for number in range(len(self.sets))]
        permuted = [_permuted(number, *of_set) for number, of_set in enumerate(zip(self.sets, seeds, strict=True))]
        return grain.MapDataset.select_from_datasets(permuted, _Interleaved(self.weights))

    def identity(self) -> dict[str, Any]:
        """What tells it from others; of a single set as if there were no mixtures."""
        if len(self.sets) == 1:
            return {"rows_sha256": self.sets[0].fingerprint, "rows": len(self.sets[0])}
        return {
            "rows_sha256": [rows.fingerprint for rows in self.sets],
            "rows": [len(rows) for rows in self.sets],
            "weights": list(self.weights),
        }

    def log(self, draws: int) -> None:
        """Says what so many draws take of each set."""
        for of_set, weight in zip(self.sets, self.weights, strict=True):
            logger.info(
                "rows: %.2f%% of each batch from the %d rows of %s, %.2f epochs in this run",
                100 * weight,
                len(of_set),
                of_set.folder,
                draws * weight / len(of_set),
            )


def make_mixture(weighted: Sequence[tuple[Rows, float]]) -> Mixture:
    """Sets with weights of any sum.

    They are put in the order of their fingerprints: which rows a run reads does not depend on the order, nor on the
    names, that its configuration has.

    Raises:
      UserError: two sets hold the same rows; names both.
    """
    pairs = sorted(weighted, key=lambda pair: pair[0].fingerprint)
    for (one, _), (other, _) in zip(pairs, pairs[1:], strict=False):
        if one.fingerprint == other.fingerprint:
            raise UserError(f"data.mixture: {one.folder} and {other.folder} hold the same rows; name one of them")
    total = sum(weight for _, weight in pairs)
    return Mixture(tuple(rows for rows, _ in pairs), tuple(weight / total for _, weight in pairs))


def open_train(config: Config) -> Mixture:
    """The training rows that a configuration asks for.

    Raises:
      UserError: see `rows.open_rows`; or a folder of the mixture has no training rows.
    """
    weighted = []
    for folder, weight in config.prepared_dirs.items():
        opened = rows.open_rows(folder, "train")
        if opened is None:
            raise UserError(f"{folder} has no training rows")
        weighted.append((opened, weight))
    return make_mixture(weighted)


def open_held_out(config: Config) -> dict[str, Rows]:
    """The held-out rows of each folder that has any, by its name, which is its whole path if others end alike."""
    folders = list(config.prepared_dirs)
    opened = {folder: rows.open_rows(folder, "eval") for folder in folders}
    names = [folder.name for folder in folders]
    return {
        (folder.name if names.count(folder.name) == 1 else str(folder)): found
        for folder, found in opened.items()
        if found is not None
    }


def entropy(sets: Iterable[Rows]) -> float | None:
    """Nats a token of all sets together that no model can do without; None where it is not known of one."""
    found = [(of_set.entropy, of_set.tokens) for of_set in sets]
    if not found or any(nats is None for nats, _ in found):
        return None
    return sum((nats or 0.0) * tokens for nats, tokens in found) / sum(tokens for _, tokens in found)


def check_folders(config: Config) -> None:
    """Makes sure that the folders of a configuration can be read as one, by its model.

    Raises:
      UserError: a folder holds no prepared rows; they differ in row length, vocabulary or tokenizer from each other or
        from the configuration; or the tokenizer in a folder is not the one that its rows were made with. Names both
        folders, and what each has.
    """
    manifests = {folder: rows.read_manifest(folder) for folder in config.prepared_dirs}
    first = next(iter(manifests))
    for folder, manifest in manifests.items():
        for name in ("n_positions", "vocab_size", "tokenizer_sha256", "eos_id"):
            if manifest[name] != manifests[first][name]:
                raise UserError(
                    f"data.mixture: {first} has {name} {manifests[first][name]}, and {folder} has {manifest[name]}: "
                    "prepare them for the same model.n_positions with the same data.tokenizer"
                )
        for name in ("n_positions", "vocab_size"):
            if manifest[name] != getattr(config.model, name):
                raise UserError(
                    f"{folder} was prepared with model.{name} {manifest[name]}, and this configuration has "
                    f"{getattr(config.model, name)}"
                )
        _check_tokenizer(folder, manifest["tokenizer_sha256"], config.data.tokenizer)


def _check_tokenizer(folder: Path, sha256: str, given: str) -> None:
    beside = folder / "tokenizer"
    paths: list[Path | str] = [beside, given] if given else [beside]
    for path in paths:
        found = load_tokenizer(path).fingerprint
        if found != sha256:
            raise UserError(
                f"the tokenizer {path} (SHA-256 {found}) is not the one that the rows of {folder} were made with "
                f"({sha256}, by its {rows.MANIFEST_FILE}): put that one back, or prepare the rows again"
            )


def _permuted(number: int, of_set: Rows, seed: int) -> grain.MapDataset[tuple[int, int]]:
    permuted = grain.MapDataset.range(len(of_set)).seed(seed).shuffle().repeat()
    return permuted.map(lambda row: (number, row))


class _Interleaved:
    """Which set a draw takes, and how many draws of that set were before.

    As in Grain's own `MapDataset.mix`, which rounds weights down to whole hundredths of the smallest one, so that
    1 : 1.009 becomes 1 : 1.
    """

    def __init__(self, weights: tuple[float, ...]):
        self._proportions = [max(1, round(weight * _RESOLUTION)) for weight in weights]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, draw: int) -> tuple[int, int]:
        # Of the first n draws, floor(n * rest / all) go to the sets after the first one, and of those again.
        before, after, everything = draw, draw + 1, sum(self._proportions)
        for number, proportion in enumerate(self._proportions):
            rest = everything - proportion
            rest_before, rest_after = before * rest // everything, after * rest // everything
            if rest_before == rest_after:
                return number, before - rest_before
            before, after, everything = rest_before, rest_after, rest
        raise AssertionError("the last set takes what no other takes")
