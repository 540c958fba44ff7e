"""Block sizes as data: which were found fastest, by device and shape."""

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

FILE = Path(__file__).with_name("block_sizes.json")


def lookup(backend: str, device_kind: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """The backend's `Blocks` tuned for the device, the head size, the type and the nearest length of a row.

    Args:
      backend: name of the kernel.
      device_kind: the vendor's name, such as 'NVIDIA H200'; the file's entries hold what it begins with.
      shape: of the packed projection, [batch, seq, 3 * heads, head_dim].
      dtype: of the packed projection.

    Returns:
      The backend's `default_blocks` where nothing was tuned.
    """
    _, seq, _, head_dim = shape
    entries = [
        entry
        for entry in _table()
        if entry["backend"] == backend
        and device_kind.startswith(entry["device"])
        and entry["head_dim"] == head_dim
        and entry["dtype"] == jnp.dtype(dtype).name
    ]
    module = importlib.import_module(f"biomedlm_jax.kernels.{backend}")
    if not entries:
        return module.default_blocks(shape, dtype)
    # The longest tuned length that is not longer: small blocks suit short rows.
    return module.Blocks(**min(entries, key=lambda entry: (entry["seq"] > seq, abs(entry["seq"] - seq)))["blocks"])


@functools.cache
def _table() -> list[dict[str, Any]]:
    return json.loads(FILE.read_text())


def store(entries: list[dict[str, Any]]) -> None:
    """Puts entries into the table, in place of those of the same backend, device, head size, type and length."""

    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry[name] for name in ("backend", "device", "head_dim", "dtype", "seq"))

    new = {key(entry): entry for entry in [*_table(), *entries]}
    rows = ",\n".join("  " + json.dumps(new[k]) for k in sorted(new))
    FILE.write_text(f"[\n{rows}\n]\n" if rows else "[]\n")
    _table.cache_clear()
