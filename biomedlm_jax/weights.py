"""Files of named tensors, safetensors' and PyTorch's: read one at a time without running anything in them, and written
one at a time. Knows nothing of models.
"""

import dataclasses
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import safetensors

from biomedlm_jax.errors import UserError

Dtype = Literal["float32", "bfloat16", "float16"]
Format = Literal["safetensors", "pytorch"]

# A tensor to be written: its name and shape.
Named = tuple[str, tuple[int, ...]]

_FILES: dict[Format, str] = {"safetensors": "model.safetensors", "pytorch": "pytorch_model.bin"}
_SAFETENSORS_CODES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file, not read yet."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def read_entries(directory: Path) -> Iterator[tuple[str, Entry]]:
    """The tensors of a folder, whole or in shards, by name; safetensors rather than PyTorch's, as transformers does.

    Raises:
      UserError: there are no weights; a file is missing, damaged, outside of the folder, or could run code.
    """
    readers = {"model.safetensors": _safetensors_entries, "pytorch_model.bin": _pytorch_entries}
    for name, read in readers.items():
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            yield from read(directory / name)
            return
        if index.is_file():
            for shard in _shards(index):
                yield from read(shard)
            return
    raise UserError(f"{directory} holds no weights: expected {' or '.join(readers)}, or the index of its shards")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    # Symbolic links are allowed: Hugging Face's cache consists of them.
    outside = [
        name
        for name in weight_map.values()
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name)
    ]
    if outside:
        names = ", ".join(sorted({repr(name) for name in outside}))
        raise UserError(f"{index} names files outside of its folder: {names}")
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(f"{index} names files that are missing: {', '.join(missing)}; copy or download them")
    return shards


def _safetensors_entries(path: Path) -> Iterator[tuple[str, Entry]]:
    names = {code: name for name, code in _SAFETENSORS_CODES.items()}

    def read(name: str) -> np.ndarray:
        # Opened for each tensor, because pages of an open file count as memory of the process.
        with safetensors.safe_open(path, "numpy") as file:
            return file.get_tensor(name)

    try:
        with safetensors.safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                part = file.get_slice(name)
                code = part.get_dtype()
                yield name, Entry(names.get(code, code), tuple(part.get_shape()), lambda name=name: read(name))  # type: ignore[misc]
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error


def _pytorch_entries(path: Path) -> Iterator[tuple[str, Entry]]:
    torch = _import_torch(f"read {path}")
    try:
        # weights_only: torch's own unpickler, which builds tensors and calls nothing else.
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)  # before PyTorch 1.6 it was no zip file
    except Exception as error:  # its unpickler meets arbitrary bytes, and lets any error through
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} is refused: it is damaged, or holds more than tensors, which could run code ({reason[0]})"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for name, value in state.items()
    ):
        raise UserError(f"{path} is no dictionary of tensors")

    def entry(value: Any) -> Entry:
        dtype = str(value.dtype).removeprefix("torch.")
        return Entry(dtype, tuple(value.shape), lambda: value.detach().float().numpy())

    for name, value in state.items():
        yield name, entry(value)


def _import_torch(purpose: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(f'PyTorch is needed to {purpose}: pip install "biomedlm_jax[torch]"') from error
    return torch


def write_shards(
    folder: Path,
    named: list[Named],
    values: Iterator[np.ndarray],
    *,
    dtype: Dtype,
    format: Format,
    max_shard_bytes: float,
    aliases: dict[str, str],
) -> list[str]:
    """Writes tensors to a folder, in one file, or in several with an index, as transformers names them.

    One tensor is in memory at a time; PyTorch's format takes a shard.

    Args:
      folder: where to write.
      named: names and shapes.
      values: the tensors, of `dtype`, in the same order.
      dtype: their type.
      format: model.safetensors or pytorch_model.bin.
      max_shard_bytes: a new file begins where the next tensor would exceed it.
      aliases: other names of tensors; only PyTorch's format has them.

    Returns:
      The names of the files.
    """
    itemsize = jnp.dtype(dtype).itemsize
    shards = _plan_shards(named, itemsize, max_shard_bytes)
    stem, suffix = os.path.splitext(_FILES[format])
    files: list[str] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}{suffix}" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}"
        if format == "safetensors":
            _write_safetensors(folder / file, shard, dtype, values)
        else:
            shard = _write_pytorch(folder / file, shard, dtype, values, aliases)
        files.append(file)
        weight_map |= {name: file for name, _ in shard}
    if len(shards) > 1:
        total = sum(math.prod(shape) for _, shape in named) * itemsize
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / f"{stem}{suffix}.index.json", index)
    return files


def _plan_shards(named: list[Named], itemsize: int, max_shard_bytes: float) -> list[list[Named]]:
    """Tensors in order, a new shard where the next one would not fit, as transformers splits them."""
    shards: list[list[Named]] = [[]]
    used = 0
    for name, shape in named:
        size = math.prod(shape) * itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, shape))
        used += size
    return shards


def _write_safetensors(path: Path, shard: list[Named], dtype: Dtype, values: Iterator[np.ndarray]) -> None:
    """A safetensors file, streamed: the library's own writer wants all tensors in memory.

    The format: length of the header, header as JSON padded to 8 bytes, then the tensors' bytes one after the other
    (https://github.com/huggingface/safetensors#format).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard:
        begin, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": _SAFETENSORS_CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _ in shard:
            file.write(np.ascontiguousarray(next(values)).reshape(-1).view(np.uint8).data)


def _write_pytorch(
    path: Path, shard: list[Named], dtype: Dtype, values: Iterator[np.ndarray], aliases: dict[str, str]
) -> list[Named]:
    torch = _import_torch(f"write {path.name}")
    state = {}
    for name, _ in shard:
        value = next(values)
        # NumPy's bfloat16 is unknown to PyTorch; its bytes are not.
        state[name] = torch.from_numpy(value.view(f"i{value.itemsize}")).view(getattr(torch, dtype))
    # The same storage: written once.
    state |= {alias: state[name] for alias, name in aliases.items() if name in state}
    torch.save(state, path)
    return [(name, tuple(value.shape)) for name, value in state.items()]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: UserError: the file holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object as transformers does."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
