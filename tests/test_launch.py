"""The files of launch/ against real schemas, and what they do when run against stand-ins for the clouds.

Slurm is run for real in test_slurm.py.
"""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from biomedlm_jax import config as config_lib
from biomedlm_jax import distributed

REPOSITORY = Path(__file__).parents[1]
LAUNCH = REPOSITORY / "launch"
JOBSETS = ("jobset-a100.yaml", "jobset-tpu-v5p.yaml")
POD = LAUNCH / "tpu/pod.sh"
SCRIPTS = ("slurm/train.sbatch", "slurm/prepare.sbatch", "tpu/pod.sh")


def read_yaml(name):
    return yaml.safe_load((LAUNCH / name).read_text())


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def place_in(environ):
    """Where train would stand in that environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            patch.delenv(name, raising=False)
        for name, value in environ.items():
            patch.setenv(name, value)
        return distributed.find_place()


def lost(given, kept, where=""):
    """Paths of what is in `given` and not in `kept`."""
    if isinstance(given, dict):
        for key, value in given.items():
            yield from lost(value, kept[key], f"{where}.{key}") if key in kept else [f"{where}.{key}"]
    elif isinstance(given, list):
        for index, value in enumerate(given):
            yield from lost(value, kept[index], f"{where}[{index}]")
    elif given != kept:
        yield where


# ---- Shell


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell_scripts_parse(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name):
    if not shutil.which("shellcheck"):
        pytest.skip("apt-get install shellcheck")
    result = subprocess.run(
        ["shellcheck", "--exclude=SC1091", LAUNCH / name], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_the_readme_names_what_is_there():
    text = (LAUNCH / "README.md").read_text()
    named = set(re.findall(r"\blaunch/[\w./-]*\w", text))
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()
    files = {
        str(path.relative_to(REPOSITORY)) for path in LAUNCH.glob("*/*") if not path.name.startswith("Dockerfile.")
    }
    assert {name for name in files if "__pycache__" not in name} <= named, "launch/README.md does not name all"


# ---- Kubernetes


@pytest.mark.parametrize("name", JOBSETS)
def test_jobsets_satisfy_the_schemas(name):
    models = pytest.importorskip(
        "kubeflow_trainer_api.models.jobset_v1alpha2_job_set", reason="no kubeflow-trainer-api"
    )
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate")
    jobset = read_yaml(f"gke/{name}")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    # Types are checked in reading; what the schema does not know is dropped.
    assert list(lost(jobset, models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict())) == []
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}} | replicated["template"]
        for version in ("1.30", "1.34"):
            kubernetes_validate.validate(job, version, strict=True)


def test_storage_satisfies_the_schema_and_is_what_the_jobsets_mount():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate")
    claim = read_yaml("gke/storage.yaml")
    for version in ("1.30", "1.34"):
        kubernetes_validate.validate(claim, version, strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name in JOBSETS:
        volumes = pod_spec(name)["volumes"]
        assert claim["metadata"]["name"] in [
            volume.get("persistentVolumeClaim", {}).get("claimName") for volume in volumes
        ]


def job_spec(name):
    (replicated,) = read_yaml(f"gke/{name}")["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    return replicated["template"]["spec"]


def pod_spec(name):
    return job_spec(name)["template"]["spec"]


def container(name):
    (only,) = pod_spec(name)["containers"]
    return only


@pytest.mark.parametrize("name", JOBSETS)
def test_train_takes_the_arguments_of_the_jobsets(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # the image has configs/ in its working directory, too
    config = config_lib.parse_args("train", "", container(name)["args"])
    mounts = [mount["mountPath"] for mount in container(name)["volumeMounts"]]
    for path in (config.run.dir, config.data.dir, *config_lib.as_paths(config.data.train_files)):
        assert path.startswith(f"{mounts[0]}/"), "not on what the hosts share"


def test_each_pod_of_gpus_finds_its_place():
    jobset, job = read_yaml("gke/jobset-a100.yaml"), job_spec("jobset-a100.yaml")
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    name = jobset["metadata"]["name"]
    places = []
    for index in range(job["completions"]):
        annotations = {"batch.kubernetes.io/job-completion-index": str(index)}  # by the Job controller
        environ = {}
        for variable in container("jobset-a100.yaml")["env"]:
            if "value" in variable:
                environ[variable["name"]] = variable["value"]
            else:
                path = variable["valueFrom"]["fieldRef"]["fieldPath"]
                environ[variable["name"]] = annotations[re.fullmatch(r"metadata\.annotations\['(.*)'\]", path)[1]]
        places.append(place_in(environ))
    # JobSet calls its pods <jobset>-<replicated job>-<job>-<pod>, in the subdomain <jobset>.
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    host = f"{name}-{jobset['spec']['replicatedJobs'][0]['name']}-0-0.{name}"
    port = container("jobset-a100.yaml")["ports"][0]["containerPort"]
    assert {place.address for place in places} == {f"{host}:{port}"}
    assert [(place.index, place.count) for place in places] == [(index, len(places)) for index in range(len(places))]


def test_the_slice_has_as_many_hosts_as_pods():
    job, chips_per_host = job_spec("jobset-tpu-v5p.yaml"), container("jobset-tpu-v5p.yaml")["resources"]["limits"]
    topology = pod_spec("jobset-tpu-v5p.yaml")["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(int(side) for side in topology.split("x"))
    assert job["parallelism"] == job["completions"] == chips // chips_per_host["google.com/tpu"]
    assert job["completionMode"] == "Indexed"  # what GKE numbers a slice's hosts by


@pytest.mark.parametrize("name", JOBSETS)
@pytest.mark.parametrize(
    ("exit_code", "disrupted", "action"),
    [
        (2, False, "FailJobSet"),
        (143, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (143, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, False, "RestartJobSet"),
        (1, False, "RestartJobSet"),
    ],
)
def test_what_follows_the_end_of_a_pod(name, exit_code, disrupted, action):
    """By the rules of the Job controller and of JobSet's, with their messages."""
    train = container(name)["name"]
    assert job_spec(name)["backoffLimit"] == 0 and pod_spec(name)["restartPolicy"] == "Never"
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job_spec(name)["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if codes and codes["containerName"] == train and codes["operator"] == "In" and exit_code in codes["values"]:
            what = f"Container {train} for pod default/x failed with exit code {exit_code}"
        elif disrupted and {"type": "DisruptionTarget", "status": "True"} in conditions:
            what = "Pod default/x has condition DisruptionTarget"
        else:
            continue
        assert rule["action"] == "FailJob"
        reason, message = "PodFailurePolicy", f"{what} matching FailJob rule at index {index}"
        break
    policy = read_yaml(f"gke/{name}")["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    for rule in policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            assert rule["action"] == action
            return
    assert action == "RestartJobSet"  # JobSet's default


def test_the_image_is_made_from_what_is_there():
    lines = (LAUNCH / "gke/Dockerfile").read_text().splitlines()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    kept = {line[1:] for line in (LAUNCH / "gke/Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    for line in lines:
        if line.startswith("COPY "):
            sources = line.split()[1:-1]
            assert all((REPOSITORY / source).exists() for source in sources) and set(sources) <= kept
    assert "LICENSE" in kept and (REPOSITORY / project["readme"]).name in kept
    (accelerator,) = (line.partition("=")[2] for line in lines if line.startswith("ARG ACCELERATOR"))
    assert {accelerator, "tpu"} <= project["optional-dependencies"].keys()
    assert 'ENTRYPOINT ["python", "-m", "biomedlm_jax.train"]' in lines
    minor = int(re.match(r"FROM python:3\.(\d+)-slim", "\n".join(line for line in lines if "FROM" in line))[1])
    assert minor in (11, 12, 13) and project["requires-python"] == ">=3.11,<3.14"


# ---- SkyPilot

READ_TASK = """
import json, sys
import sky
task = sky.Task.from_yaml_str(open(sys.argv[1]).read().replace("BUCKET: null", "BUCKET: a-bucket"))
(resources,) = task.resources
print(json.dumps({
    "num_nodes": task.num_nodes,
    "accelerators": resources.accelerators,
    "spot": resources.use_spot,
    "recovery": resources.job_recovery,
    "mounts": {path: [storage.name, storage.mode.value] for path, storage in task.storage_mounts.items()},
}))
"""


def test_skypilot_reads_the_task(tmp_path):
    pytest.importorskip("sky.utils.schemas", reason="no skypilot")
    env = os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    result = subprocess.run(
        [sys.executable, "-c", READ_TASK, LAUNCH / "skypilot/train.yaml"],
        env=env,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    task = json.loads(result.stdout.splitlines()[-1])
    assert (task["num_nodes"], task["accelerators"], task["spot"]) == (16, {"A100": 8}, True)
    assert task["recovery"]["max_restarts_on_errors"] == 3
    assert task["mounts"] == {"/data": ["a-bucket", "MOUNT"]}


STUB_PYTHON = """\
#!/bin/sh
env > "environ"
printf '%s\\n' "$@" > arguments
"""


def test_each_host_of_skypilot_finds_its_place(tmp_path, monkeypatch):
    task = read_yaml("skypilot/train.yaml")
    write_program(tmp_path / "bin/python", STUB_PYTHON)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text(f"PATH={shlex.quote(str(tmp_path / 'bin'))}:$PATH\n")
    hosts = task["num_nodes"]
    for rank in range(hosts):
        skypilot = {
            "SKYPILOT_NODE_IPS": "\n".join(f"10.0.0.{host + 1}" for host in range(hosts)),
            "SKYPILOT_NUM_NODES": str(hosts),
            "SKYPILOT_NODE_RANK": str(rank),
            "ARGS": task["envs"]["ARGS"],
        }
        subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env=os.environ | skypilot, check=True)
        environ = dict(line.split("=", 1) for line in (tmp_path / "environ").read_text().splitlines() if "=" in line)
        place = place_in(environ)
        assert (place.address, place.count, place.index) == ("10.0.0.1:8476", hosts, rank)
    module, *arguments = (tmp_path / "arguments").read_text().splitlines()[1:]
    assert module == "biomedlm_jax.train"
    monkeypatch.chdir(REPOSITORY)
    config = config_lib.parse_args("train", "", arguments)
    assert config.run.dir.startswith("/data/") and config_lib.as_paths(config.data.train_files)[0].endswith(
        "*.jsonl.zst"
    )


# ---- TPU VMs

# Notes its calls (words end with 037, calls with 036); answers from files, a line each time, the last one for ever.
FAKE_GCLOUD = """\
#!/usr/bin/env bash
here=$(dirname "$0")
{ printf '%s\\037' "$@"; printf '\\036'; } >>"$here/calls"
answer() {
    head -n 1 "$here/$1"
    if [ "$(wc -l <"$here/$1")" -gt 1 ]; then sed -i 1d "$here/$1"; fi
}
case "$*" in
    *"queued-resources list"*) answer states ;;
    *"systemctl show"*) answer train | tr ' ' '\\n' ;;
esac
"""
RUNNING = "ExecMainCode=0 ExecMainStatus=0 SubState=running"


def ended(status):
    return f"ExecMainCode=1 ExecMainStatus={status} SubState={'failed' if status else 'exited'}"


@pytest.fixture
def pod(tmp_path):
    """Runs pod.sh with a stand-in for gcloud; returns its status, what it said, and the calls of gcloud."""

    def run(*args, states=(), train=(), **variables):
        write_program(tmp_path / "gcloud", FAKE_GCLOUD)
        (tmp_path / "calls").write_text("")
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        (tmp_path / "train").write_text("".join(f"{state}\n" for state in train))
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "POLL_SECONDS": "0"}
        env |= {"ZONE": "us-east5-a", "NFS": "10.0.0.2:/biomedlm"} | variables
        result = subprocess.run([POD, *args], env=env, capture_output=True, text=True, timeout=60, check=False)
        calls = [call.split("\037")[:-1] for call in (tmp_path / "calls").read_text().split("\036")[:-1]]
        return result.returncode, result.stdout + result.stderr, calls

    return run


def done(calls):
    """The calls that change something, in short."""
    verbs = []
    for call in calls:
        command = " ".join(call)
        for verb, mark in (
            ("create", "queued-resources create"),
            ("delete", "queued-resources delete"),
            ("copy", "tpu-vm scp"),
            ("install", "uv pip install"),
            ("start", "systemd-run"),
        ):
            if mark in command:
                verbs.append(verb)
    return verbs


ONCE = ["copy", "install", "start"]


def test_a_dry_run_prints_the_commands_and_runs_none(pod):
    status, said, calls = pod("--dry-run", "run", "--config", "c.yaml", "--data.train_files", "/data/a b/*.zst")
    assert status == 0 and calls == []
    printed = [call for call in said.splitlines() if call.startswith("gcloud compute tpus ")]
    assert ["create" in printed[0], "scp" in printed[1], "delete" in printed[-1]] == [True] * 3
    assert len(printed) == len(said.splitlines()) == 5


def test_a_run_survives_preemptions_and_failures(pod):
    status, said, calls = pod(
        "run",
        *("--config", "c.yaml"),
        states=["", "WAITING_FOR_RESOURCES", *["ACTIVE"] * 4, "SUSPENDED", "SUSPENDED", "", *["ACTIVE"] * 9],
        train=[RUNNING, RUNNING, RUNNING, ended(1), RUNNING, ended(0)],
    )
    assert status == 0, said
    assert done(calls) == ["create", *ONCE, "delete", "create", *ONCE, *ONCE, "delete"]
    assert "preempted: SUSPENDED" in said and "ended with 1, 1 of at most 5 times" in said


def test_a_mistake_is_not_tried_again(pod):
    status, said, calls = pod("run", states=["", "ACTIVE"], train=[RUNNING, ended(2)])
    assert status == 2 and done(calls) == ["create", *ONCE] and "a mistake in the settings" in said


@pytest.mark.parametrize("end", [ended(1), "ExecMainCode=2 ExecMainStatus=9 SubState=failed", "SubState=dead"])
def test_what_always_fails_is_given_up(pod, end):
    status, said, calls = pod("run", states=["ACTIVE"], train=[end])
    assert status == 1 and done(calls) == ONCE * 5 and "given up" in said


def test_a_person_s_stop_ends_the_loop(pod):
    status, said, calls = pod("run", states=["ACTIVE"], train=[RUNNING, ended(143)])
    assert status == 143 and done(calls) == ONCE and "stopped and saved" in said


def test_arguments_reach_train_as_they_are(pod, tmp_path):
    arguments = ["--config", "c.yaml", "--data.train_files", "/data/it's $HOME/*.zst"]
    status, said, calls = pod("start", *arguments)
    assert status == 0, said
    (command,) = (word.removeprefix("--command=") for word in calls[0] if word.startswith("--command="))
    assert "--worker=all" in calls[0]
    # What a host does with it: sudo is systemd-run's here.
    write_program(tmp_path / "host/sudo", '#!/bin/sh\n[ "$1" = systemctl ] || printf "%s\\n" "$@" >> "$HOME/unit"\n')
    env = {"PATH": f"{tmp_path}/host:{os.environ['PATH']}", "HOME": str(tmp_path)}
    subprocess.run(["bash", "-c", command], env=env, check=True)
    unit = (tmp_path / "unit").read_text().splitlines()
    assert unit[0] == "systemd-run" and unit[unit.index("-m") + 1 :] == ["biomedlm_jax.train", *arguments]


@pytest.mark.parametrize(("variable", "command"), [("ZONE", "status"), ("NFS", "run"), ("NFS", "install")])
def test_what_must_be_set_is_asked_for(pod, variable, command):
    status, said, calls = pod(command, **{variable: ""})
    assert status == 2 and calls == [] and said.startswith(f"error: {variable} is not set")


def test_an_unknown_command_shows_how_it_is_used(pod):
    status, said, calls = pod("strat")
    assert status == 2 and calls == [] and "install       copies this checkout" in said


@pytest.mark.slow
def test_gcloud_knows_the_options(pod):
    gcloud = shutil.which("gcloud")
    if not gcloud:
        pytest.skip("no gcloud")
    _, _, calls = pod("run", states=["", "ACTIVE", "ACTIVE", "SUSPENDED", "", "ACTIVE"], train=[RUNNING, ended(0)])
    options = {}
    for call in calls:
        words = [word for word in call if not word.startswith("--")]
        options.setdefault(tuple(words[:4]), set()).update(word.split("=")[0] for word in call if word[:2] == "--")
    assert len(options) == 5
    for words, used in options.items():
        help_text = subprocess.run([gcloud, *words, "--help"], capture_output=True, text=True, check=True).stdout
        known = set(re.findall(r"--[a-z][a-z-]+", re.sub(r"\x1b\[[\d;]*m", "", help_text)))
        assert used - known == set(), words


# ---- Ray


def test_ray_prepares_on_all_nodes(tmp_path, subprocess_env):
    """A real cluster of two nodes, though of one machine."""
    pytest.importorskip("ray", reason="no ray")
    from ray import cluster_utils

    environment = subprocess_env | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)  # of the workers
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
    try:
        folder = tmp_path / "rows"
        command = [
            *(sys.executable, str(LAUNCH / "ray/prepare.py"), "--config", str(REPOSITORY / "configs/quickstart.yaml")),
            *("--data.dir", str(folder), "--data.synthetic_documents", "20001", "--data.processes", "1"),
        ]
        environment["RAY_ADDRESS"] = cluster.address
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        ends = [line for line in done.stderr.splitlines() if ": status " in line]
        assert done.returncode == 0 and len(ends) == 2 and all(": status 0: " in line for line in ends), done.stderr
        assert "sharing the work" in done.stdout + done.stderr
        assert json.loads((folder / "manifest.json").read_text())["splits"]["train"]["documents"] == 20_001
        mistake = [*command, "--data.tokenizer", "nowhere"]
        done = subprocess.run(mistake, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 2 and "status 2: error: " in done.stderr, done.stderr
    finally:
        cluster.shutdown()
