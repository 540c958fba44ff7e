"""Prepares rows of token ids on all nodes of a Ray cluster.

    python launch/ray/prepare.py --config configs/biomedlm_2_7b.yaml --data.train_files '/data/pile/train/*.zst'

Run it on any node of the cluster, or with RAY_ADDRESS, from the checkout, on a file system that all nodes share, with
biomedlm_jax installed in the Python of Ray's workers; data.dir must lie on such a file system, too, and that must have
locks which hold between nodes. Without a cluster it uses this machine.

Every node runs `python -m biomedlm_jax.prepare` with these arguments, takes input files that no other has taken, and
waits for the others at the end: any number of them makes the same rows. The same command goes on after a failure.
"""

import os
import subprocess
import sys

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=1, max_retries=3)
def prepare(folder: str, args: list[str]) -> tuple[int, str]:
    """What the command said last, and its status. Its messages appear where Ray shows those of workers."""
    command = [sys.executable, "-m", "biomedlm_jax.prepare", *args]
    # One process a core of the node, as without Ray, which tells each task to use as many as it has reserved.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    last = ""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            last = line.rstrip() or last
            print(last, flush=True)
    return process.returncode, last


def main() -> int:
    """The worst status of all nodes'."""
    ray.init(log_to_driver=True)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    found = ray.get(
        [
            prepare.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)).remote(
                os.getcwd(), sys.argv[1:]
            )
            for node in nodes
        ]
    )
    for node, (status, last) in zip(nodes, found, strict=True):
        print(f"{node['NodeManagerHostname']}: status {status}: {last}", file=sys.stderr)
    return max(status for status, _ in found)


if __name__ == "__main__":
    sys.exit(main())
