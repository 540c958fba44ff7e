"""A real Slurm of a few nodes on one machine, which leaves nothing behind.

    python tests/slurm_cluster.py                       # a shell in which sbatch, squeue and scontrol know the cluster
    python tests/slurm_cluster.py sbatch --wait job.sh  # or one command

Each node is a slurmd with a host name of its own and GPUs that are /dev/null; all addresses are this machine's
loopback. Daemons, keys, spools and logs live in a temporary folder. Needs root, for the host names and because Slurm
starts jobs as their users, and Debian's packages slurm-wlm and munge.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey", "unshare")
_GPUS = 8

# Two partitions over the same nodes: a job of `high` preempts those of `low`, which get SIGTERM and a minute's grace.
_SLURM_CONF = """\
ClusterName=one-machine
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait}
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing() -> str:
    """Why there can be no cluster here, and what to do; empty if nothing is missing."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    absent = [name for name in _PROGRAMS if not shutil.which(name)]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install {' '.join(PACKAGES)}"
    allowed = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True, text=True, check=False)
    return f"nodes cannot have names of their own: {allowed.stderr.strip()}" if allowed.returncode else ""


class Cluster:
    """Its daemons, and the environment in which Slurm's commands find it."""

    def __init__(self, folder: Path, nodes: int, kill_wait: int):
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._daemons: list[subprocess.Popen[bytes]] = []
        ports = _free_ports(nodes + 1)
        lines = "\n".join(
            f"NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=8000 Gres=gpu:{_GPUS}"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        )
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", "spool", "gpus", "log"):
            (folder / name).mkdir()
        for gpu in range(_GPUS):
            (folder / "gpus" / f"gpu{gpu}").symlink_to("/dev/null")
        for name in self.nodes:
            (folder / "spool" / name).mkdir()
        conf = _SLURM_CONF.format(folder=folder, controller_port=ports[0], nodes=lines, kill_wait=kill_wait)
        (folder / "slurm.conf").write_text(conf)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpus/gpu[0-{_GPUS - 1}]\n")
        (folder / "hosts").write_text(f"127.0.0.1 localhost controller {' '.join(self.nodes)}\n")

    def run(self, *command: str) -> str:
        """Standard output of one of Slurm's commands.

        Raises:
          RuntimeError: it failed; with what it said.
        """
        result = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120, check=False)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {(result.stderr or result.stdout).strip()}")
        return result.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode and so on."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def start(self) -> None:
        """Starts the daemons, and waits until all nodes are idle.

        Raises:
          RuntimeError: they are not, after a minute; with the daemons' last words.
        """
        munge = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "seed-file": "munged.seed",
            "log-file": "log/munged.log",
        }
        subprocess.run(["mungekey", "--create", "--keyfile", self.folder / "munge.key"], check=True)
        self._spawn("munged", ["munged", "--foreground", *(f"--{k}={self.folder / v}" for k, v in munge.items())])
        self._spawn("slurmctld", _on_host("controller", self.folder / "hosts", ["slurmctld", "-D"]))
        for name in self.nodes:
            self._spawn(name, _on_host(name, self.folder / "hosts", ["slurmd", "-D", "-N", name]))
        states = ""
        for _ in range(120):
            with contextlib.suppress(RuntimeError):
                states = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T")
                if states.split() == ["idle"] * len(self.nodes):
                    return
            if any(daemon.poll() is not None for daemon in self._daemons):
                break
            time.sleep(0.5)
        logs = [f"{log.name}: {''.join(log.read_text().splitlines(True)[-5:])}" for log in self.folder.glob("log/*")]
        raise RuntimeError(f"Slurm does not start (nodes: {states.split()})\n" + "\n".join(logs))

    def stop(self) -> None:
        """Ends all jobs and daemons."""
        with contextlib.suppress(RuntimeError):
            self.run("scancel", "--full", "--signal=KILL", "--user=root")
            self.run("scancel", "--user=root")
            for _ in range(60):
                if not self.run("squeue", "--noheader", "--states=all", "--format=%T").count("COMPLETING"):
                    break
                time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _spawn(self, name: str, command: list[str]) -> None:
        with open(self.folder / "log" / f"{name}.out", "wb") as log:
            # Away from the terminal, whose Ctrl-C is for the command that runs here.
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )


@contextlib.contextmanager
def run_cluster(nodes: int = 2, kill_wait: int = 60) -> Iterator[Cluster]:
    """A cluster that is there inside the `with` block.

    Args:
      nodes: how many nodes it has, of 2 cores and 8 make-believe GPUs.
      kill_wait: seconds between SIGTERM and SIGKILL for a job that is stopped.

    Raises:
      RuntimeError: it does not start.
    """
    # Short, since a socket's path may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        os.chmod(folder, 0o755)  # munged wants to be reached by everybody
        cluster = Cluster(Path(folder), nodes, kill_wait)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _on_host(name: str, hosts: Path, command: list[str]) -> list[str]:
    """The command, for which this machine has another name and knows other hosts."""
    script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
    return ["unshare", "--mount", "--uts", "sh", "-c", script, name, str(hosts), *command]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main() -> int:
    """Runs a command while there is a cluster; its status."""
    reason = missing()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with run_cluster() as cluster:
        print(f"{' and '.join(cluster.nodes)} are up; their daemons' logs are in {cluster.folder}/log", file=sys.stderr)
        return subprocess.run(
            sys.argv[1:] or [os.environ.get("SHELL", "bash")], env=cluster.env, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
