#!/usr/bin/env python3
"""Starts a run of several processes on this machine, as a pod would have them on several hosts.

    python launch/local/run.py --processes 2 --devices 4 -- --config configs/quickstart.yaml --run.dir runs/first

What follows `--` goes to each `python -m biomedlm_jax.train`, or `finetune` with `--command finetune`, as it is. With
NVIDIA GPUs each process gets its share of those in CUDA_VISIBLE_DEVICES, or of all; else, or with `--devices`, each
gets so many devices of the CPU. Standard library only.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

# How long processes may take to end by themselves when one has failed: they find out by run.heartbeat_timeout.
GRACE_SECONDS = 60


def main() -> int:
    """Runs the processes; returns the first status that is not 0, in the order in which they ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many to start (default: 2)")
    parser.add_argument("--devices", type=int, help="CPU devices of each process, even where there are GPUs")
    parser.add_argument(
        "--command", choices=("train", "finetune"), default="train", help="what to run (default: train)"
    )
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="what the command gets")
    options = parser.parse_args()
    if options.processes < 1 or (options.devices is not None and options.devices < 1):
        parser.error("--processes and --devices must be at least 1")
    gpus = [] if options.devices else visible_gpus()
    if len(gpus) % options.processes:
        parser.error(f"{options.processes} processes cannot share {len(gpus)} GPUs evenly: choose another --processes")

    address = f"127.0.0.1:{free_port()}"
    processes = []
    for index in range(options.processes):
        env = os.environ | {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(options.processes),
            "JAX_PROCESS_ID": str(index),
            "PYTHONUNBUFFERED": "1",
        }
        if gpus:
            share = len(gpus) // options.processes
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * share : (index + 1) * share])
        else:
            env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices or 1)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", f"biomedlm_jax.{options.command}", *options.arguments],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches them through this process, once
            )
        )
    readers = [threading.Thread(target=show, args=(index, process.stdout)) for index, process in enumerate(processes)]
    for reader in readers:
        reader.start()

    def forward(number: int, frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    status = wait(processes)
    for reader in readers:
        reader.join()
    return status


def wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """The first status that is not 0, and 0 without one; ends the others when one has failed and they go on."""
    status, failed_at, running = 0, 0.0, list(processes)
    while running:
        for process in list(running):
            code = process.poll()
            if code is None:
                continue
            running.remove(process)
            if code and not status:
                # As a shell counts a death by a signal.
                status, failed_at = code if code > 0 else 128 - code, time.monotonic()
        if status and time.monotonic() - failed_at > GRACE_SECONDS:
            for process in running:
                process.kill()
        time.sleep(0.1)
    return status


def show(index: int, output: IO[bytes]) -> None:
    """Writes a process's output line by line behind its number."""
    for line in output:
        sys.stdout.buffer.write(b"[%d] %s\n" % (index, line.rstrip(b"\r\n")))
        sys.stdout.buffer.flush()


def visible_gpus() -> list[str]:
    """Names of this machine's NVIDIA GPUs, as CUDA_VISIBLE_DEVICES takes them; none without a driver."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name and name != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(index) for index, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
