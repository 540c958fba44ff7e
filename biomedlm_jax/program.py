"""The training step as compiled programs, one for each shape of batch."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax


class Program:
    """A jitted training step that is compiled ahead of its first call.

    Attributes:
      from_cache: whether all that was compiled was found in JAX's persistent cache.
    """

    def __init__(self, jitted: Any):
        """Args: `jitted`, of `step.jit_train_step`."""
        self._jitted = jitted
        self._compiled: dict[Any, Any] = {}
        self.from_cache = True

    def compile(self, state: Any, batch: Any, *frozen: Any) -> None:
        """Compiles the step for what it will be called with, of which only shapes, types and shardings matter."""
        if _shapes(batch) in self._compiled:
            return
        lowered = self._jitted.lower(state, batch, *frozen)
        with _cache_hits() as hits:
            self._compiled[_shapes(batch)] = lowered.compile()
        self.from_cache = self.from_cache and bool(hits)

    def __call__(self, state: Any, batch: Any, *frozen: Any) -> Any:
        """What the step returns; compiles it first for a shape that is new."""
        self.compile(state, batch, *frozen)
        return self._compiled[_shapes(batch)](state, batch, *frozen)


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
