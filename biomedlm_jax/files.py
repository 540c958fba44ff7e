"""Files and folders that are complete whenever they are there under their name."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


def replace_file(path: str | Path, content: bytes) -> None:
    """Writes a file, so that a crash or a full disk leaves the old one or the new one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


@contextlib.contextmanager
def complete_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to write to, which becomes `path` at the end, or vanishes on an error.

    What a killed process leaves is named `path`.partial, and is removed by the next try. An empty folder in the place
    of `path` is replaced.
    """
    path = Path(path).absolute()
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
