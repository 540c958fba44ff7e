"""launch/slurm/train.sbatch, as it is, on a real Slurm of two nodes: stopped in every way, it ends as undisturbed."""

import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
import tiny

from biomedlm_jax import config as config_lib
from biomedlm_jax import metrics, preparation, rows
from biomedlm_jax.errors import UserError

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "launch/slurm/train.sbatch"
STEPS, CHECKPOINT_EVERY = 60, 16
# Jobs that shall be stopped take two seconds a step from here on until they are: Slurm may need half a minute for it,
# and a fast machine must not be done by then.
SLOW_FROM = 24
SITECUSTOMIZE = f"""
import os, time
if "TO_BE_STOPPED" in os.environ and "SLURM_PROCID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    from biomedlm_jax import metrics
    advance = metrics.MetricWriter.advance
    metrics.MetricWriter.advance = lambda self, step: (advance(self, step), time.sleep(2 * (step >= {SLOW_FROM})))
"""


@pytest.fixture(scope="module")
def cluster():
    reason = slurm_cluster.missing()
    if reason:
        # CI installs it: there, nothing would be tested without anybody noticing.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with slurm_cluster.run_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder to submit from: its .venv is this Python and the code under test, on CPU devices."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    write_activate(folder, Path(sys.executable).parent, f"{REPOSITORY}:{folder}")
    config = tiny.run_config(
        folder / "prepared", "", train={"steps": STEPS, "eval_every": 0, "checkpoint_every": CHECKPOINT_EVERY}
    )
    preparation.ensure_prepared(config)
    config_lib.save_config(config, folder / "config.yaml")
    return folder


def write_activate(checkout, path, pythonpath=""):
    variables = f"PATH={shlex.quote(str(path))}:$PATH PYTHONPATH={shlex.quote(pythonpath)}"
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/activate").write_text(f"export {variables} JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4\n")


class Job:
    """A submitted script."""

    def __init__(self, cluster, checkout, name, *args, to_be_stopped=False):
        self.cluster, self.run_dir = cluster, checkout / name
        self.id = cluster.run(
            *("sbatch", "--parsable", f"--chdir={checkout}", "--nodes=2", "--partition=low"),
            *(["--export=ALL,TO_BE_STOPPED=1"] if to_be_stopped else []),
            *(str(SCRIPT), "--config", "config.yaml", "--run.dir", name, *args),
        )
        self._log = checkout / f"slurm-{self.id}.out"

    def __getitem__(self, field):
        return self.cluster.job(self.id)[field]

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def losses(self) -> dict[int, float]:
        try:
            lines = metrics.read_metrics(self.run_dir)
        except UserError:
            return {}
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}

    def wait_for(self, what, condition):
        for _ in range(3000):
            if condition():
                return
            time.sleep(0.2)
        pytest.fail(f"job {self.id} ({self['JobState']}) is not {what} after ten minutes:\n{self.log[-3000:]}")

    def wait_for_the_slow_steps(self):
        self.wait_for(f"at step {SLOW_FROM}", lambda: max(self.losses(), default=0) >= SLOW_FROM)
        assert self["JobState"] == "RUNNING" and self["Restarts"] == "0"

    def wait_for_requeue(self, restarts=1):
        """Waits until the job is back in the queue, and cuts short Slurm's two minutes there."""
        self.wait_for("requeued", lambda: self["JobState"] == "PENDING" and self["Restarts"] == str(restarts))
        time.sleep(2)  # nodes take no credential for it from the second of its end
        self.cluster.run("scontrol", "update", f"JobId={self.id}", "StartTime=now")

    def wait_for_end(self) -> str:
        self.wait_for("over", lambda: self["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
        return self["JobState"]

    def process(self, rank: int) -> int:
        """The id of train's process of that rank."""
        wanted = {f"SLURM_JOB_ID={self.id}", f"SLURM_PROCID={rank}"}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ = (folder / "environ").read_text().split("\0")
                if wanted <= set(environ) and "biomedlm_jax.train" in (folder / "cmdline").read_text().split("\0"):
                    return int(folder.name)
            except OSError:
                continue
        raise AssertionError(f"rank {rank} of job {self.id} does not run")


@pytest.fixture(scope="module")
def undisturbed(cluster, checkout):
    """Losses by step of a run that nothing stops."""
    job = Job(cluster, checkout, "undisturbed")
    assert job.wait_for_end() == "COMPLETED", job.log
    assert job["Restarts"] == "0"
    losses = job.losses()
    assert list(losses) == list(range(1, STEPS + 1)) and losses[STEPS] < losses[1] - 0.5
    return losses


def requeue(job):
    job.cluster.run("scontrol", "requeue", job.id)


def reach_the_time_limit(job):
    # The limit is three minutes from the start now, and SIGTERM due three minutes before it.
    job.cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=3")


def preempt(job):
    job.cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


@pytest.mark.parametrize("stop", [requeue, reach_the_time_limit, preempt])
def test_a_stopped_job_saves_and_goes_on(cluster, checkout, undisturbed, stop):
    job = Job(cluster, checkout, stop.__name__, to_be_stopped=True)
    job.wait_for_the_slow_steps()
    stop(job)
    job.wait_for_requeue()
    saved = int(re.search(r"stopped by SIGTERM: step ([\d,]+) is saved", job.log)[1].replace(",", ""))
    assert SLOW_FROM <= saved < STEPS
    if stop is reach_the_time_limit:
        cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    assert job.wait_for_end() == "COMPLETED", job.log
    assert job["Restarts"] == "1"
    assert f"going on from step {saved}" in job.log
    assert job.losses() == undisturbed


def test_a_job_whose_process_was_killed_goes_on_from_the_last_checkpoint(cluster, checkout, undisturbed):
    job = Job(cluster, checkout, "killed", to_be_stopped=True)
    job.wait_for_the_slow_steps()
    os.kill(job.process(rank=1), signal.SIGKILL)
    job.wait_for_requeue()
    assert "process 1 (node2)" in job.log, "who was killed is not said"
    failures = (checkout / f"slurm-{job.id}.failures").read_text()
    assert failures.count("\n") == 1 and "node[1-2]" in failures
    assert job.wait_for_end() == "COMPLETED", job.log
    assert int(re.search(r"going on from step (\d+)", job.log)[1]) % CHECKPOINT_EVERY == 0
    assert job.losses() == undisturbed


def test_a_mistake_is_not_tried_again(cluster, checkout):
    job = Job(cluster, checkout, "mistake", "--train.global_batch_size", "9")
    assert job.wait_for_end() == "FAILED"
    assert (job["Restarts"], job["ExitCode"]) == ("0", "2:0")
    assert "error: train.global_batch_size" in job.log and "Traceback" not in job.log


def test_a_cancelled_job_is_saved_and_does_not_come_back(cluster, checkout):
    job = Job(cluster, checkout, "cancelled", to_be_stopped=True)
    job.wait_for_the_slow_steps()
    cluster.run("scancel", job.id)
    assert job.wait_for_end() == "CANCELLED"
    assert "stopped by SIGTERM" in job.log and job["Restarts"] == "0"


def test_a_job_that_always_fails_is_given_up(cluster, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/python").chmod(0o755)
    write_activate(tmp_path, tmp_path / "bin")
    job = Job(cluster, tmp_path, "run")
    for restart in range(1, 6):
        job.wait_for_requeue(restart)
    assert job.wait_for_end() == "FAILED"
    assert job["Restarts"] == "5"
    assert "not requeued: 5 tries have failed before" in job.log


def test_an_array_of_jobs_prepares_what_one_process_would(cluster, checkout, tmp_path):
    """Two hosts, one of which loses its job."""
    changes = {"synthetic_documents": 60_000, "processes": 1}
    config = tiny.run_config("unused", "", data=changes | {"dir": str(tmp_path / "alone")})
    preparation.ensure_prepared(config)
    config_lib.save_config(config, checkout / "prepare.yaml")
    folder, work = checkout / "shared", checkout / ".shared.partial"
    script = REPOSITORY / "launch/slurm/prepare.sbatch"
    job = cluster.run(
        *("sbatch", "--parsable", f"--chdir={checkout}", "--array=0-1", "--time=10", str(script)),
        *("--config", "prepare.yaml", "--data.dir", str(folder)),
    )

    def states():
        tasks = cluster.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(field.split("=", 1) for field in task.split() if "=" in field)["JobState"] for task in tasks]

    logs = [checkout / f"slurm-{job}_{task}.out" for task in range(2)]
    deadline = time.monotonic() + 300
    while not (work / "index-00002.json").exists() or not any(
        "sharing the work" in log.read_text() for log in logs if log.exists()
    ):
        assert time.monotonic() < deadline, [log.read_text() for log in logs if log.exists()]
        time.sleep(0.1)
    cluster.run("scancel", f"{job}_1")
    while set(states()) & {"PENDING", "RUNNING", "COMPLETING"}:
        assert time.monotonic() < deadline, states()
        time.sleep(0.5)
    assert sorted(states()) == ["CANCELLED", "COMPLETED"]
    assert not work.exists()
    found, expected = (rows.read_manifest(path) for path in (folder, tmp_path / "alone"))
    for name in ("splits", "shards", "tokenizer_sha256"):
        assert found[name] == expected[name]
