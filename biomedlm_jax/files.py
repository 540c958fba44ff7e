"""Files and folders that are complete whenever they are there under their name, and locks on them."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from biomedlm_jax.errors import UserError


def replace_file(path: str | Path, content: bytes) -> None:
    """Writes a file, so that a crash or a full disk leaves the old one or the new one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def check_output(option: str, path: str | None) -> None:
    """Raises: UserError: the file that an option names, if any, is a folder, or would lie in one that is not there."""
    if path and Path(path).is_dir():
        raise UserError(f"{option} {path} is a folder: name a file")
    if path and not Path(path).absolute().parent.is_dir():
        raise UserError(f"{option} {path}: there is no such folder")


def refuse_mount(path: Path) -> None:
    """Raises: UserError: a folder is a mount point, which a complete one cannot replace."""
    if path.is_mount():
        raise UserError(f"{path} is a mount point, which cannot be replaced when all is written: choose a folder in it")


@contextlib.contextmanager
def complete_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to write to, which becomes `path` at the end, or vanishes on an error.

    What a killed process leaves is beside it, named `.NAME.PID.partial`. An empty folder in the place of `path` is
    replaced.

    Raises:
      UserError: `path` is a mount point, which cannot be replaced.
    """
    path = Path(os.path.abspath(path))
    refuse_mount(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def try_lock(path: Path, wait: bool) -> Iterator[bool]:
    """Holds a lock file, which the system frees if the process dies.

    Gives false at once if another process holds it and `wait` is false.

    Args:
      path: the file; it stays when the lock is given back.
    """
    # NFS wants a file that is open for writing.
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def share_lock(path: Path, when_alone: Callable[[], None]) -> Iterator[bool]:
    """Holds a lock file with all others who ask for it so; gives whether nobody else held it.

    Args:
      when_alone: called first if nobody holds it. In what it writes all holders can trust that nobody else has been
        alone since they read it.
    """
    with path.open("a") as file:
        alone = False
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            when_alone()
            alone = True
        # The system may let another one be alone before it grants this.
        fcntl.flock(file, fcntl.LOCK_SH)
        yield alone


@contextlib.contextmanager
def lock(path: Path, when_taken: Callable[[], None]) -> Iterator[None]:
    """Holds a lock file, as `try_lock` does.

    Args:
      when_taken: called if another process holds it, before waiting for that; may raise instead.
    """
    with try_lock(path, wait=False) as held:
        if held:
            yield
            return
    when_taken()
    with try_lock(path, wait=True):
        yield
