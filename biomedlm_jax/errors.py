"""What a command says to its user: progress as it goes, and mistakes in one line."""

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable

from tqdm import tqdm

# EX_USAGE-like: the request cannot be met; the message says what to change.
USER_ERROR_STATUS = 2


class UserError(Exception):
    """A mistake in the request or its input; the message says what is wrong, where, and what to do."""


def reason(error: BaseException) -> str:
    """What went wrong at the bottom, in one line: Orbax, TensorStore and TFDS raise many lines of many types."""
    while error.__cause__:
        error = error.__cause__
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].split(" [tensorstore_spec")[0]
    return "no space left on device" if "No space left on device" in line else line


class _AboveProgressBars(logging.Handler):
    """Writes messages to standard error without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits the process: its status, or one line on standard error for a user's mistake.

    A `UserError`, Ctrl-C, a closed pipe, a missing or unreadable file, and a full disk end without a traceback;
    anything else is a defect of ours and keeps its traceback.
    """
    package_logger = logging.getLogger("biomedlm_jax")
    package_logger.setLevel(logging.INFO)
    package_logger.propagate = False  # libraries set up the root logger, too
    package_logger.addHandler(_AboveProgressBars())
    # Orbax and asyncio log a traceback for every failure of a save, which is also raised, and named below; and
    # TensorStore's threads then find the event loop closed.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda what: (
        None if "Event loop is closed" in str(what.exc_value) else sys.__unraisablehook__(what)
    )
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Threads that compile or save may be at work: leave without taking the interpreter apart under them.
        os._exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # Of `| head`, who has read enough; what is left in the buffer must not be written at the exit, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USER_ERROR_STATUS)


def explain(error: BaseException) -> str | None:
    """What a user should read of an error, in one line; None for a defect of ours, which keeps its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(
        error, FileNotFoundError | FileExistsError | PermissionError | NotADirectoryError | IsADirectoryError
    ):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    remedies = {
        errno.ENOSPC: "make room and start the same command again",
        errno.EDQUOT: "make room and start the same command again",
        errno.EROFS: "choose a folder that can be written to",
    }
    if isinstance(error, OSError) and error.errno in remedies:
        return f"{error.filename or 'writing'}: {error.strerror}; {remedies[error.errno]}"
    return None
