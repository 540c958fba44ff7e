"""Several processes, each with the devices of its host: their places, what they agree on, and what ends them all.

Arrays are exchanged by the compiled steps. Everything else goes through the key-value store of JAX's coordination
service, which process 0 runs, under `biomedlm_jax/`:

    about/<i>        host, versions, settings and devices of process i
    done/<what>      process 0 has done what the others wait for, and its result
    all/<what>/<i>   whether something is so in process i
    lifeline         a port of process 0 that the others are connected to, to see at once when it is killed
    alive/<i>        counts up every second; process 0 looks for one that stands still
    notice/failure   why all end: written by the process that fails, or by process 0 for one that fell silent
    notice/stop      the signal after which all save and end
    tick/<i>         how far process i was then; all stop one tick after the furthest
    seen/<i>         process i has read the failure, so process 0 may end, too
"""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from etils import epy

import biomedlm_jax
from biomedlm_jax import errors
from biomedlm_jax.config import Config, RunConfig
from biomedlm_jax.errors import UserError
from biomedlm_jax.finetune_config import FinetuneConfig

with epy.lazy_imports():
    import jax

logger = logging.getLogger(__name__)

_ROOT = "biomedlm_jax/"
_PULSE = 1.0  # seconds between signs of life
_DAY = 24 * 3600  # what is watched otherwise may take as long as it likes
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# What begins the messages of JAX that tell of a fault in this process, and not in the exchange with others.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND", "OUT_OF_RANGE")
# Status of processes that end because another one was killed or hangs; one that fails shares its own.
_ENDED_WITH_OTHERS = 1
_RESTART = "start all processes again to go on from the last checkpoint"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run."""

    address: str
    """host:port at which process 0 coordinates."""
    count: int
    """Processes of the run."""
    index: int
    """This one's number, from 0."""
    source: str
    """Who said so, for messages."""


def find_place() -> Place | None:
    """This process's place: from JAX_* variables, else a Slurm step, else a TPU slice's metadata; None if it is alone.

    Raises:
      UserError: variables are missing, or contradict each other.
    """
    place = _place_from_variables() or _place_from_slurm() or _place_from_tpu()
    if place is None:
        return None
    if not 0 <= place.index < place.count:
        raise UserError(f"{place.source}: process {place.index} is not one of {place.count}, numbered from 0")
    return place if place.count > 1 else None


def _place_from_variables() -> Place | None:
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if len(missing) == len(_VARIABLES):
        return None
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: several processes need "
            f"all of {', '.join(_VARIABLES)}; a single one needs none"
        )
    address = os.environ[_VARIABLES[0]]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"{_VARIABLES[0]} must be HOST:PORT, not {address!r}")
    count, index = (_whole_number(name) for name in _VARIABLES[1:])
    return Place(address, count, index, f"{_VARIABLES[1]} and {_VARIABLES[2]}")


def _place_from_slurm() -> Place | None:
    # A batch script is no step, and what it starts without srun is one process.
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"} <= os.environ.keys():
        return None
    count, index = (_whole_number(name) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))
    if count <= 1:
        return None
    from jax._src.clusters import SlurmCluster

    address = SlurmCluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))
    return Place(address, count, index, "Slurm")


def _place_from_tpu() -> Place | None:
    from jax._src import clusters, hardware_utils

    # Without chips there is no metadata server to wait for, even where libtpu is installed, as to compile from afar.
    platforms = jax.config.jax_platforms or "tpu"  # type: ignore[attr-defined]
    if "tpu" not in platforms or not hardware_utils.num_available_tpu_chips_and_device_id()[0]:
        return None
    for cluster in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
        if cluster.is_env_present():
            address = cluster.get_coordinator_address(300, os.environ.get("JAX_COORDINATOR_PORT"))
            return Place(address, cluster.get_process_count(), cluster.get_process_id(), "the TPU slice's metadata")
    return None


def _whole_number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise UserError(f"{name} must be a whole number, not {os.environ[name]!r}") from error


class Job:
    """A run of one process: what `join` gives where there are no others."""

    index = 0
    count = 1

    def __init__(self) -> None:
        self._requested = 0
        self.stop_signal = 0
        """The signal that `should_stop` was true for; 0 until then."""

    def request_stop(self, number: int) -> None:
        """Asks all processes to stop soon, because this one got a signal; safe in a signal handler."""
        self._requested = self._requested or number

    def should_stop(self) -> bool:
        """Whether to stop here: the same answer in all processes, which must ask at the same points."""
        self.stop_signal = self._requested
        return bool(self.stop_signal)

    def first(self, what: str, action: Callable[[], Any]) -> Any:
        """The result of `action`, which process 0 alone takes while the others wait.

        Args:
          what: what they wait for, for their users.
          action: its result must be what JSON can hold.
        """
        return action()

    def all(self, what: str, here: bool) -> bool:
        """Whether something is so in all processes, each of which must ask, once for each `what`."""
        return here

    def closing(self, resource: Any) -> contextlib.AbstractContextManager[Any]:
        """Closes it at the end; but where one of several processes fails, the others hear of that first."""
        return contextlib.closing(resource)

    def check_devices(self) -> None:
        """Starts the devices, and logs which process has which.

        Raises:
          UserError: processes have different numbers of them.
        """

    def check_folder(self, folder: Path) -> None:
        """Makes sure that all see what process 0 has made.

        Raises:
          UserError: this process does not see the folder.
        """


@contextlib.contextmanager
def join(config: Config | FinetuneConfig) -> Iterator[Job]:
    """Meets the other processes of the run, before any device is used; at the end waits for them to end, too.

    If one of several processes fails, all of them end with a message that names it: this process then exits here.

    Raises:
      UserError: see `find_place`; or the others cannot be reached.
    """
    place = find_place()
    if place is None:
        yield Job()
        return
    if place.index:
        logging.getLogger("biomedlm_jax").setLevel(logging.WARNING)
    job = _Member(place, _connect(place, config.run), config.run.heartbeat_timeout)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        job.meet(config)
        yield job
        job.leave()
    except BaseException as error:
        job.fail(error)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _connect(place: Place, settings: RunConfig) -> Any:
    """The client of the coordination service that process 0 runs."""
    until = time.monotonic() + settings.connect_timeout
    if place.index:
        _wait_for_coordinator(place, settings.connect_timeout)

    def give_up() -> None:
        # JAX itself would abort, with a stack trace.
        print(
            f"error: not all {place.count} processes met at {place.address} within run.connect_timeout "
            f"({settings.connect_timeout} s): see which one was not started, has ended, or has the number of another",
            file=sys.stderr,
            flush=True,
        )
        os._exit(errors.USER_ERROR_STATUS)

    timer = threading.Timer(max(1.0, until - time.monotonic()), give_up)
    timer.daemon = True
    timer.start()
    # It takes SIGTERM for itself, and knows nothing of SIGINT; `should_stop` does the same for both.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            place.address,
            place.count,
            place.index,
            cluster_detection_method="deactivate",  # under Slurm it would take one GPU a process
            initialization_timeout=settings.connect_timeout + 60,
            # JAX aborts with a stack trace when it misses a process: our own message should come first.
            heartbeat_timeout_seconds=settings.heartbeat_timeout + 60,
        )
    except RuntimeError as error:
        raise UserError(f"cannot coordinate {place.count} processes at {place.address}: {_line(error)}") from error
    finally:
        timer.cancel()
    # When process 0 dies, JAX's client aborts this process at once, without saying who died. The handler of abort()
    # is called with the number 6, so `sleep` leaves six seconds to say it (see `_Member._hold_lifeline`) and to end.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)
    from jax._src import distributed

    return distributed.global_state.client


def _wait_for_coordinator(place: Place, timeout: int) -> None:
    host, port = _host_and_port(place.address)
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, until - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() + _PULSE > until:
                raise UserError(
                    f"process {place.index} cannot reach process 0 at {place.address} ({place.source}) within "
                    f"run.connect_timeout ({timeout} s): {error.strerror or error}; see whether it runs, and whether "
                    "a firewall is between"
                ) from error
        time.sleep(_PULSE)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class _Member(Job):
    """One process of several."""

    def __init__(self, place: Place, client: Any, heartbeat_timeout: int):
        super().__init__()
        self.index, self.count = place.index, place.count
        self._client, self._timeout = client, heartbeat_timeout
        self._hosts: dict[int, str] = {}
        self._ticks, self._stop_at, self._agreed = 0, 0, 0
        self._tick_lock = threading.Lock()  # held while the processes compare their ticks
        self._silence: dict[int, float] = collections.defaultdict(float)  # seconds since each one's last sign of life
        self._counters: dict[int, str] = {}
        self._leaving, self._ending = threading.Event(), threading.Lock()
        background = [self._beat]
        if self.index == 0:
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            self._lifeline = socket.create_server(
                ("", 0), family=family, backlog=self.count, dualstack_ipv6=family == socket.AF_INET6
            )
            self._set("lifeline", self._lifeline.getsockname()[1])
        else:
            background += [self._watch, functools.partial(self._hold_lifeline, _host_and_port(place.address)[0])]
        for work in background:
            threading.Thread(target=work, daemon=True).start()

    # ---- What the run asks for

    def should_stop(self) -> bool:
        with self._tick_lock:
            self._ticks += 1
            if self._stop_at and self._ticks >= self._stop_at:
                self.stop_signal = self._agreed
        return bool(self.stop_signal)

    def first(self, what: str, action: Callable[[], Any]) -> Any:
        key = f"done/{what}"
        if self.index == 0:
            result = action()
            self._set(key, result)
            return result
        return json.loads(self._wait_for(key, what))

    def all(self, what: str, here: bool) -> bool:
        self._set(f"all/{what}/{self.index}", here)
        self._client.wait_at_barrier(f"{_ROOT}all/{what}", _DAY * 1000)
        return all(self._all(f"all/{what}").values())

    @contextlib.contextmanager
    def closing(self, resource: Any) -> Iterator[Any]:
        try:
            yield resource
        except BaseException as error:
            # To close would be to wait for the others, who do not know yet that they wait in vain.
            self.fail(error)
        resource.close()

    def check_devices(self) -> None:
        kind, own = jax.devices()[0].device_kind, jax.local_device_count()
        self._set(f"devices/{self.index}", own)
        self._client.wait_at_barrier(f"{_ROOT}devices", _DAY * 1000)
        counts = self._all("devices")
        if len(set(counts.values())) > 1:
            raise UserError(
                "all processes must have equally many devices, and "
                + ", ".join(f"{self._name(index)} has {counts[index]}" for index in sorted(counts))
            )
        hosts = sorted(set(self._hosts.values()))
        shown = ", ".join(hosts[:8]) + (", ..." if len(hosts) > 8 else "")
        many = "hosts" if len(hosts) > 1 else "host"
        logger.info("devices: %d processes on %d %s (%s), %d x %s each", self.count, len(hosts), many, shown, own, kind)

    def check_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(
                f"{folder}, which {self._name(0)} has made, is not on {self._hosts[self.index]}: it must lie on a "
                "file system that all processes share"
            )

    # ---- From the first to the last

    def meet(self, config: Config | FinetuneConfig) -> None:
        """Learns who is there.

        Raises:
          UserError: another version or other settings than process 0 has.
        """
        settings = {
            f"{group}.{name}": value
            for group, section in dataclasses.asdict(config).items()
            for name, value in section.items()
        }
        about = {"biomedlm_jax": biomedlm_jax.__version__, "jax": jax.__version__} | settings
        self._set(f"host/{self.index}", socket.gethostname())
        if self.index == 0:
            self._set("about", about)
        self._client.wait_at_barrier(f"{_ROOT}meet", _DAY * 1000)
        self._hosts = self._all("host")
        reference = json.loads(self._wait_for("about", "describe itself"))
        about = json.loads(json.dumps(about))
        differing = [name for name in about if about[name] != reference.get(name)]
        if differing:
            values = [
                f"{name} is {about[name]} in {self._name(self.index)} and {reference.get(name)} in {self._name(0)}"
                for name in differing[:3]
            ]
            more = f", and {len(differing) - 3} more differ" if len(differing) > 3 else ""
            raise UserError(f"all processes must have the same settings: {'; '.join(values)}{more}")

    def leave(self) -> None:
        """Waits until all are here, and parts from them."""
        self._client.wait_at_barrier(f"{_ROOT}leave", _DAY * 1000)
        self._leaving.set()
        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> NoReturn:
        """Tells the others why this process fails, and exits."""
        if isinstance(error, Exception) and _from_elsewhere(error):
            # Another process has probably died: who it was shows when its signs of life stay away.
            logger.warning("an exchange with other processes failed (%s); looking for the one that ended", _line(error))
            time.sleep(self._timeout + 10 * _PULSE)
        text, status = errors.explain(error), errors.USER_ERROR_STATUS
        if isinstance(error, KeyboardInterrupt):
            text, status = "interrupted", 128 + signal.SIGINT
        elif isinstance(error, SystemExit) and isinstance(error.code, int):
            text, status = "terminated", error.code
        elif text is None:
            traceback.print_exception(error)
            text, status = f"{type(error).__name__}: {_line(error)}", 1
        self._set_first("notice/failure", {"process": self.index, "message": f"failed: {text}", "status": status})
        self._end(text, status, knowing={self.index})

    # ---- In the background

    def _beat(self) -> None:
        """Gives signs of life, and listens to the others."""
        pulse, count = _PULSE, 0
        while not self._leaving.wait(pulse):
            count += 1
            try:
                self._set(f"alive/{self.index}", count, overwrite=True)
                self._silence[0] = 0
                notices = {key: json.loads(value) for key, value in self._dir("notice")}
                if "failure" in notices:
                    self._end_with(**notices["failure"], told=True)
                if self.index == 0:
                    self._look_for_silence(pulse)
                if self._requested and "stop" not in notices:
                    self._set_first("notice/stop", self._requested)
                if "stop" in notices and not self._stop_at:
                    pulse = self._agree(notices["stop"])
            except jax.errors.JaxRuntimeError as error:
                if not self._leaving.is_set():
                    self._end_with(0, f"can no longer be reached ({_line(error)}); {_RESTART}")

    def _watch(self) -> None:
        """Ends this process when process 0 no longer answers it: `_beat` itself would wait for ever."""
        # Counted in pulses, not read from a clock: a machine that was suspended has not waited for anybody.
        while not self._leaving.wait(_PULSE):
            self._silence[0] += _PULSE
            if self._silence[0] > self._timeout:
                self._end_with(0, self._silent())

    def _hold_lifeline(self, host: str) -> None:
        """Ends this process as soon as process 0 is gone, and with it the key-value store and JAX's client."""
        try:
            port = json.loads(self._wait_for("lifeline", "listen"))
            lifeline = socket.create_connection((host, port))
        except (OSError, jax.errors.JaxRuntimeError):
            return  # a firewall, perhaps: then JAX's client has the word, or `_watch`
        # Nobody accepts the connection, or writes to it: it ends when the system closes the other side's sockets.
        with lifeline, contextlib.suppress(OSError):
            lifeline.recv(1)
        if not self._leaving.is_set():
            self._end_with(0, f"was killed; {_RESTART}")

    def _look_for_silence(self, pulse: float) -> None:
        for index, counter in self._all("alive").items():
            if counter != self._counters.get(index):
                self._counters[index], self._silence[index] = counter, 0
        for index in range(1, self.count):
            self._silence[index] += pulse
            if self._silence[index] > self._timeout:
                self._set_first("notice/failure", {"process": index, "message": self._silent()})

    def _silent(self) -> str:
        return f"gave no sign of life for {self._timeout} s: it was killed, hangs, or cannot be reached; {_RESTART}"

    def _agree(self, number: int) -> float:
        """Finds the tick after which all stop, in several rounds; returns the seconds until the next."""
        if not self._agreed:
            self._tick_lock.acquire()
            self._agreed = number
            self._set(f"tick/{self.index}", self._ticks)
        ticks = self._all("tick")
        if len(ticks) < self.count:
            return _PULSE / 10
        self._stop_at = max(ticks.values()) + 1
        self._tick_lock.release()
        return _PULSE

    def _end_with(self, process: int, message: str, status: int = _ENDED_WITH_OTHERS, told: bool = False) -> NoReturn:
        """Exits because another process has failed."""
        self._end(f"{self._name(process)} {message}", status, {self.index, process}, told)

    def _end(self, message: str, status: int, knowing: set[int], told: bool = False) -> NoReturn:
        """Exits with a message.

        Args:
          knowing: the processes that have heard of it.
          told: process 0 waits to hear that this process has, too.
        """
        self._ending.acquire()  # for ever, if another thread is at it
        # Whatever of the following hangs: nothing is left to wait for.
        last_resort = threading.Timer(10 * _PULSE, os._exit, [status])
        last_resort.daemon = True
        last_resort.start()
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if told:
            self._set_first(f"seen/{self.index}", True)
        if self.index == 0:
            # The others learn from this process's store why they end, so it must not go before they know.
            until = time.monotonic() + 5 * _PULSE
            while len(knowing | self._all("seen").keys()) < self.count and time.monotonic() < until:
                time.sleep(_PULSE / 10)
        # Threads wait for processes that are gone: leave without them.
        os._exit(status)

    # ---- The key-value store

    def _name(self, index: int) -> str:
        return f"process {index} ({self._hosts.get(index, 'its host is not known yet')})"

    def _set(self, key: str, value: Any, overwrite: bool = False) -> None:
        self._client.key_value_set(_ROOT + key, json.dumps(value), allow_overwrite=overwrite)

    def _set_first(self, key: str, value: Any) -> None:
        """Sets a value unless another process was faster, or nobody listens any more."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._set(key, value)

    def _dir(self, folder: str) -> list[tuple[str, str]]:
        return [(key.rpartition("/")[2], value) for key, value in self._client.key_value_dir_get(f"{_ROOT}{folder}/")]

    def _all(self, folder: str) -> dict[int, Any]:
        return {int(key): json.loads(value) for key, value in self._dir(folder)}

    def _wait_for(self, key: str, what: str) -> str:
        """A value that process 0 will write; says so if that takes long. What goes wrong there ends this process."""
        waited = 0
        while True:
            try:
                return self._client.blocking_key_value_get(_ROOT + key, int(_PULSE * 1000))
            except jax.errors.JaxRuntimeError as error:
                if not str(error).startswith("DEADLINE_EXCEEDED"):
                    raise
            waited += 1
            if waited % 30 == 0:
                logger.warning("process %d waits for %s to %s", self.index, self._name(0), what)


def _from_elsewhere(error: BaseException | None) -> bool:
    """Whether an error may be the consequence of another process's end."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(_OWN_FAULTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _line(error: BaseException) -> str:
    return errors.reason(error)[:200]
