"""The training step as compiled programs, one for each shape of batch, which must fit into a device's memory."""

import bisect
import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from biomedlm_jax import devices
from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError
from biomedlm_jax.finetune_config import FinetuneConfig
from biomedlm_jax.planning import memory

logger = logging.getLogger(__name__)


def memory_limit() -> int | None:
    """Bytes that a program may take of this process's first device; None where nobody counts, as on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


class Program:
    """A training step that is compiled ahead of its first call; use it under the mesh set by `jax.set_mesh`.

    Attributes:
      from_cache: whether all that was compiled was found in JAX's persistent cache.
    """

    def __init__(self, config: Config | FinetuneConfig, jit: Callable[[Any], Any], limit: int | None):
        """Args: `jit`, from a configuration to the step of `step.jit_train_step`; `limit`, see `memory_limit`."""
        self._config, self._jit, self._limit = config, jit, limit
        self._compiled: dict[Any, Any] = {}
        self._ran: set[Any] = set()
        self.from_cache = True

    def compile(self, state: Any, batch: Any, *frozen: Any) -> None:
        """Compiles the step for what it will be called with, of which only shapes, types and shardings matter.

        Raises:
          UserError: it needs more memory than a device allows; says how many sequences at once fit.
        """
        if _shapes(batch) in self._compiled:
            return
        with _cache_hits() as hits:
            compiled, needed = self._compile(self._config, (state, batch, *frozen))
        if compiled is None or needed > (self._limit or math.inf):
            raise UserError(self._too_large(needed, (state, batch, *frozen)))
        self._compiled[_shapes(batch)] = compiled
        self.from_cache = self.from_cache and bool(hits)

    def __call__(self, state: Any, batch: Any, *frozen: Any) -> Any:
        """What the step returns; compiles it first for a shape that is new.

        Raises:
          UserError: the first step of this shape does not find the memory that it needs.
        """
        shapes = _shapes(batch)
        self.compile(state, batch, *frozen)
        if shapes in self._ran:
            return self._compiled[shapes](state, batch, *frozen)
        self._ran.add(shapes)
        try:
            return jax.block_until_ready(self._compiled[shapes](state, batch, *frozen))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = _bytes_of(self._compiled[shapes]) or math.inf
            smaller = f"the next smaller number is {self._in_parts(self._smaller[-1])}; " if self._smaller else ""
            raise UserError(
                f"{self._need(needed)}, and the first step did not find them: {smaller}{self._savings}"
            ) from error

    def _compile(self, config: Any, arguments: tuple[Any, ...]) -> tuple[Any, float]:
        """The compiled step and the bytes that it needs; None and infinity where the compiler finds no way."""
        lowered = self._jit(config).lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None, math.inf
        return compiled, _bytes_of(compiled)

    def _too_large(self, needed: float, arguments: tuple[Any, ...]) -> str:
        """Why the step is refused, with the largest number of sequences at once that fits, found by compiling."""
        limit = self._limit or math.inf

        def is_too_large(sequences: int) -> bool:
            parts = self._a_device // sequences
            train: Any = dataclasses.replace(self._config.train, gradient_accumulation_steps=parts)
            compiled, needs = self._compile(dataclasses.replace(self._config, train=train), arguments)
            logger.info("%s", self._need(needs, sequences))
            return compiled is None or needs > limit

        logger.info("%s; compiling with fewer, to find how many fit", self._need(needed))
        fitting = bisect.bisect_left(self._smaller, True, key=is_too_large)
        most = (
            f"the largest that fits is {self._in_parts(self._smaller[fitting - 1])}" if fitting else "not even 1 fits"
        )
        return f"{self._need(needed)}: {most}; {self._savings}"

    @property
    def _a_device(self) -> int:
        """Sequences of the whole batch that a device gets."""
        return self._config.train.global_batch_size // jax.sharding.get_abstract_mesh().size

    @property
    def _smaller(self) -> list[int]:
        """Smaller numbers of sequences at once than the configuration's, in which a batch can be computed."""
        now = self._a_device // self._config.train.gradient_accumulation_steps
        return [sequences for sequences in range(1, now) if self._a_device % sequences == 0]

    def _need(self, needed: float, sequences: int | None = None) -> str:
        """What so many sequences at once need, by default the configuration's."""
        sequences = sequences or self._a_device // self._config.train.gradient_accumulation_steps
        noun = "sequence" if isinstance(self._config, Config) else "example"
        subject = f"{sequences} {noun} a device needs" if sequences == 1 else f"{sequences} {noun}s a device need"
        kind = devices.current_device().kind
        allowed = f"the {self._limit / 1e9:.1f} GB that a {kind} allows" if self._limit else f"what a {kind} has"
        return f"{subject} {'more than' if needed == math.inf else f'{needed / 1e9:.1f} GB of'} {allowed}"

    def _in_parts(self, sequences: int) -> str:
        parts = self._a_device // sequences
        return f"{sequences} (train.gradient_accumulation_steps {parts} computes the batch in such parts)"

    @property
    def _savings(self) -> str:
        """What else needs less memory."""
        remat = {"none": ["model.remat matmuls or full"], "matmuls": ["model.remat full"], "full": []}
        unchunked = self._config.train.loss_chunk in (0, self._config.model.n_positions)
        chunk = ["train.loss_chunk"] if unchunked else []
        return f"{', '.join([*remat[self._config.model.remat], *chunk, 'more devices'])} need less, too"


def _bytes_of(compiled: Any) -> int:
    """The bytes that a program needs; 0 where this backend does not tell, which is no reason to end a run."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        stats = compiled.memory_analysis()
        return memory.total_bytes(stats) if stats else 0
    return 0


def _shapes(batch: Any) -> tuple[Any, ...]:
    return tuple(x.shape for x in jax.tree.leaves(batch))


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """The programs that JAX finds in its persistent cache meanwhile, one entry each."""
    hits: list[str] = []

    def listen(event: str, **about: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)
