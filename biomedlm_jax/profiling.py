"""A profile of a few steps of a run, for XProf (TensorBoard) and Perfetto."""

import logging
from pathlib import Path

import jax

from biomedlm_jax.errors import UserError

logger = logging.getLogger(__name__)

FOLDER = "profile"

# The first step of a process loads the program and the second one warms up.
_SKIPPED = 2


def check_folder(run_dir: str | Path) -> None:
    """Makes the folder of a run's profiles. Raises: UserError: it cannot be made."""
    folder = Path(run_dir) / FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"train.profile_steps cannot write to {folder}: {error.strerror}") from error


class Profile:
    """Records some steps of a process, from its third on.

    Attributes:
      first: the first step to record.
      last: the last one.
      is_recording: whether it does just now.
    """

    def __init__(self, run_dir: str, start_step: int, steps: int):
        """Args: `start_step`, completed before this process; `steps`, how many to record; 0 records none."""
        self.first = start_step + _SKIPPED + 1
        self.last = start_step + _SKIPPED + steps
        self._folder = Path(run_dir) / FOLDER
        self._wanted = steps > 0
        self.is_recording = False

    def start(self) -> None:
        """Begins to record."""
        self._wanted = False
        try:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self.is_recording = True
        except (OSError, RuntimeError) as error:  # a run does not end for want of its profile
            logger.warning("no profile is recorded: %s", str(error).splitlines()[0])

    def stop(self) -> None:
        """Writes what was recorded, if anything was."""
        if not self.is_recording:
            return
        self.is_recording = False
        try:
            jax.profiler.stop_trace()
        except (OSError, jax.errors.JaxRuntimeError) as error:
            logger.warning("the profile cannot be written to %s: %s", self._folder, str(error).splitlines()[0])
            return
        logger.info(
            "profile from step %d on: xprof --logdir %s shows it (pip install xprof), and https://ui.perfetto.dev its "
            "perfetto_trace.json.gz",
            self.first,
            self._folder,
        )

    def close(self) -> None:
        """Stops, and says so if nothing was recorded although it should."""
        self.stop()
        if self._wanted:
            logger.warning("train.profile_steps has recorded nothing: it begins with step %d", self.first)
