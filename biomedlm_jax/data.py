"""From rows on disk to the global batch of a step.

The global batch is a function of (rows, seed, step) and of nothing else: not of the number of processes or devices,
nor of what ran before. So a run resumes from one integer, at once, on any topology, and reads the same rows.
"""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from biomedlm_jax.config import Config
from biomedlm_jax.mixture import Mixture
from biomedlm_jax.rows import Rows
from biomedlm_jax.step import Batch


def train_batches(
    rows: Rows | Mixture,
    seed: int,
    batch_size: int,
    start_step: int,
    stop_step: int,
    sharding: NamedSharding,
    threads: int,
    document_attention: bool = False,
) -> Iterator[Batch]:
    """The batches of steps start_step, ..., stop_step - 1, read ahead by threads.

    Each process reads only the rows that its own devices hold.

    Args:
      batch_size: rows of the global batch; step s takes draws s * batch_size and on.
      sharding: how the rows of a batch lie on the devices.
      document_attention: tells documents apart, by `segment_ids`.
    """
    mixture = _as_mixture(rows)
    shape = (batch_size, mixture.sets[0].n_positions)
    local = _local_rows(sharding, shape)
    read_tokens = step_reader(mixture, seed, batch_size, local)

    def read(step: int) -> tuple[np.ndarray, np.ndarray | None]:
        tokens = read_tokens(step)
        return tokens, segment_ids(tokens, mixture.sets[0].eos_id) if document_attention else None

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array, shape)

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    mask = place(np.ones((len(local), shape[1]), bool))
    for tokens, segments in grain.MapDataset.range(start_step, stop_step).map(read).to_iter_dataset(options):
        yield Batch(place(tokens), mask, None if segments is None else place(segments))


def abstract_batch(config: Config) -> Batch:
    """The shapes and types of a step's global batch, to compile the step for."""
    shape = (config.train.global_batch_size, config.model.n_positions)
    dtypes = (jnp.int32, bool, jnp.int32) if config.data.document_attention else (jnp.int32, bool)
    return Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes))  # type: ignore[arg-type]


def step_reader(mixture: Mixture, seed: int, batch_size: int, local: np.ndarray) -> Callable[[int], np.ndarray]:
    """A function from a step to the ids of some rows of its global batch, int32 [len(local), n_positions].

    Args:
      local: which rows of the batch, from 0 to batch_size - 1.
    """
    draws = mixture.draws(seed)

    def read(step: int) -> np.ndarray:
        sets, indices = np.array([draws[step * batch_size + int(row)] for row in local]).T
        tokens = np.empty((len(local), mixture.sets[0].n_positions), np.int32)
        for number in np.unique(sets):
            places = np.flatnonzero(sets == number)
            tokens[places] = mixture.sets[number].read(indices[places].tolist())
        return tokens

    return read


def segment_ids(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Which document of its row each token is of, int32 [batch, seq].

    A document begins at the end-of-text id before it, from which its first word is predicted. What a row begins with,
    the rest of a document of the row before, is 0.
    """
    return np.cumsum(tokens == eos_id, axis=1, dtype=np.int32)


def eval_batches(
    rows: Rows, batch_size: int, sharding: NamedSharding, limit: int = 0, document_attention: bool = False
) -> Iterator[Batch]:
    """All rows once, in order; the last batch is filled up with rows that are masked out.

    Args:
      limit: the most batches; 0 is all.
      document_attention: as of `train_batches`.
    """
    shape = (batch_size, rows.n_positions)
    count = eval_batch_count(rows, batch_size, limit)
    local = _local_rows(sharding, shape)
    for start in range(0, count * batch_size, batch_size):
        indices = start + local
        tokens = np.zeros((len(local), shape[1]), np.int32)
        inside = indices < len(rows)
        if inside.any():
            tokens[inside] = rows.read(indices[inside].tolist())
        mask = indices[:, None] * shape[1] + np.arange(shape[1]) < rows.tokens
        arrays = [tokens, mask] + ([segment_ids(tokens, rows.eos_id)] if document_attention else [])
        yield Batch(*(jax.make_array_from_process_local_data(sharding, array, shape) for array in arrays))


def eval_batch_count(rows: Rows, batch_size: int, limit: int = 0) -> int:
    """How many batches `eval_batches` yields."""
    count = -(-len(rows) // batch_size)
    return min(count, limit) if limit else count


def identity(rows: Rows | Mixture, seed: int, batch_size: int) -> dict[str, Any]:
    """What the sequence of batches depends on, as JSON holds it; a run may go on only where it is unchanged."""
    mixture = _as_mixture(rows)
    return mixture.identity() | {
        "n_positions": mixture.sets[0].n_positions,
        "seed": seed,
        "global_batch_size": batch_size,
    }


def _as_mixture(rows: Rows | Mixture) -> Mixture:
    return rows if isinstance(rows, Mixture) else Mixture((rows,), (1.0,))


def _local_rows(sharding: NamedSharding, shape: tuple[int, int]) -> np.ndarray:
    """Which rows of a global batch this process's devices hold, ascending."""
    slices = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[0])[index[0]] for index in slices if index is not None]))
