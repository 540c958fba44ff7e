"""From rows on disk to the global batch of a step.

The global batch is a function of (rows, seed, step) and of nothing else: not of the number of processes or devices,
nor of what ran before. So a run resumes from one integer, at once, on any topology, and reads the same rows.
"""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from biomedlm_jax.rows import Rows
from biomedlm_jax.step import Batch


def train_rows(rows: Rows, seed: int) -> grain.MapDataset[dict[str, np.ndarray]]:
    """An endless sequence of training rows: each epoch a permutation of all rows, seeded by (seed, epoch).

    Random access in O(1) time and memory: Grain computes where an index falls in the permutation.
    """
    return grain.MapDataset.source(rows.source).seed(seed).shuffle().repeat()


def train_batches(
    rows: Rows, seed: int, batch_size: int, start_step: int, stop_step: int, sharding: NamedSharding, threads: int
) -> Iterator[Batch]:
    """The batches of steps start_step, ..., stop_step - 1, read ahead by threads.

    Each process reads only the rows that its own devices hold.

    Args:
      batch_size: rows of the global batch; step s takes rows s * batch_size and on.
      sharding: how the rows of a batch lie on the devices.
    """
    shape = (batch_size, rows.n_positions)
    sequence = train_rows(rows, seed)
    local = _local_rows(sharding, shape)

    def read(step: int) -> np.ndarray:
        return np.stack([sequence[step * batch_size + row]["tokens"] for row in local]).astype(np.int32)

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    mask = jax.make_array_from_process_local_data(sharding, np.ones((len(local), shape[1]), bool), shape)
    for tokens in grain.MapDataset.range(start_step, stop_step).map(read).to_iter_dataset(options):
        yield Batch(jax.make_array_from_process_local_data(sharding, tokens, shape), mask)


def eval_batches(rows: Rows, batch_size: int, sharding: NamedSharding, limit: int = 0) -> Iterator[Batch]:
    """All rows once, in order; the last batch is filled up with rows that are masked out.

    Args:
      limit: the most batches; 0 is all.
    """
    shape = (batch_size, rows.n_positions)
    count = eval_batch_count(rows, batch_size, limit)
    local = _local_rows(sharding, shape)
    for start in range(0, count * batch_size, batch_size):
        indices = start + local
        tokens = np.zeros((len(local), shape[1]), np.int32)
        inside = indices < len(rows)
        for slot, index in zip(np.flatnonzero(inside), indices[inside], strict=True):
            tokens[slot] = rows.source[int(index)]["tokens"]
        mask = indices[:, None] * shape[1] + np.arange(shape[1]) < rows.tokens
        yield Batch(
            jax.make_array_from_process_local_data(sharding, tokens, shape),
            jax.make_array_from_process_local_data(sharding, mask, shape),
        )


def eval_batch_count(rows: Rows, batch_size: int, limit: int = 0) -> int:
    """How many batches `eval_batches` yields."""
    count = -(-len(rows) // batch_size)
    return min(count, limit) if limit else count


def identity(rows: Rows, seed: int, batch_size: int) -> dict[str, Any]:
    """What the sequence of batches depends on; a run may go on only where it is unchanged."""
    return {
        "rows_sha256": rows.fingerprint,
        "rows": len(rows),
        "n_positions": rows.n_positions,
        "seed": seed,
        "global_batch_size": batch_size,
    }


def _local_rows(sharding: NamedSharding, shape: tuple[int, int]) -> np.ndarray:
    """Which rows of a global batch this process's devices hold, ascending."""
    slices = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[0])[index[0]] for index in slices if index is not None]))
