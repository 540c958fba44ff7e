#!/usr/bin/env bash
# A TPU slice from nothing to a finished run, by queued resources of Google's cloud.
#
#   launch/tpu/pod.sh [--dry-run] COMMAND [train's arguments]
#
#   run ARGS      all of it: create, install, start; starts again what was preempted or failed; deletes at the end
#   create        asks for the slice, and waits until it is there
#   install       copies this checkout (what is committed) to all hosts, and installs it
#   start ARGS    starts train on all hosts
#   logs          shows the log as it grows (of the host that writes it, the first one)
#   status        the slice's state, and that of train on each host
#   stop          SIGTERM to train on all hosts, which saves; start goes on from there
#   delete        gives the slice back; run.dir, on NFS, stays
#
#   --dry-run     prints the commands instead of running them
#
# For instance:
#   export ZONE=us-east5-a TYPE=v5p-256 NFS=10.0.0.2:/biomedlm
#   launch/tpu/pod.sh run --config configs/biomedlm_2_7b.yaml --run.dir /data/runs/biomedlm_2_7b \
#     --data.dir /data/prepared/pile_pubmed_28896 --data.train_files '/data/pile/train/*.jsonl.zst'
#
# Environment (the project is gcloud's):
: "${NAME:=biomedlm}"             # of the slice, and of the queued resource
: "${ZONE:=}"                     # where
: "${TYPE:=v5p-256}"              # kind and size; of v4 and v5p half the number is chips: 128 here
: "${RUNTIME:=v2-alpha-tpuv5}"    # the hosts' image: v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv6e, tpu-ubuntu2204-base for v4
: "${SPOT:=1}"                    # 1: cheaper, and may be preempted; 0: not
: "${NFS:=}"                      # SERVER:/PATH of a Filestore instance in the same network, mounted as /data on all hosts
: "${POLL_SECONDS:=30}"           # how often to look
set -euo pipefail

max_failures=5
dry_run=false
seen_ready=false
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT

usage() { sed -n '2,/^# Environment/p' "$0" | sed 's/^# \{0,1\}//; $d' >&2; }
die() { echo "error: $1" >&2; exit 2; }
say() { echo "$(date +%T) $1" >&2; }

# Runs a command, or prints it.
do_it() {
    if $dry_run; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# Runs a shell command on hosts of the slice ("all", or numbers).
on_hosts() { do_it gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"; }

# The queued resource's state: ACTIVE when the hosts are there, SUSPENDED after a preemption, NONE when there is none.
pod_state() {
    if $dry_run; then echo ACTIVE; return; fi
    local states
    # A question that fails is no answer: only a list without it says that there is none.
    states=$(gcloud compute tpus queued-resources list --zone="$ZONE" --filter="name~/$NAME\$" \
        --format='value(state.state)') || { echo UNKNOWN; return; }
    echo "${states:-NONE}"
}

# train on the first host: "running", or its exit status when it has ended; "unknown" when the host does not answer.
train_state() {
    if $dry_run; then echo 0; return; fi
    local answer
    answer=$(on_hosts 0 'systemctl show biomedlm --property=SubState,ExecMainStatus,Result --value | paste -sd " "') ||
        { echo unknown; return; }
    # For instance: "success 0 running", "success 0 exited", "exit-code 2 failed"
    case $answer in
        *" running" | *stop*) echo running ;;
        *) grep -oE '[0-9]+' <<<"$answer" | head -n 1 || echo unknown ;;
    esac
}

create() {
    local state spot=()
    [ "$SPOT" = 1 ] && spot=(--spot)
    do_it gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${spot[@]}"
    while true; do
        state=$(pod_state)
        say "$NAME: $state"
        case $state in
            ACTIVE) return ;;
            FAILED | SUSPENDED | SUSPENDING | NONE) return 1 ;;
        esac
        sleep "$POLL_SECONDS"
    done
}

install() {
    git -C "$(dirname "$0")" rev-parse --is-inside-work-tree >/dev/null || die "$0 is not in a git checkout"
    git -C "$(dirname "$0")/../.." archive --format=tar.gz --output="$archive" HEAD
    do_it gcloud compute tpus tpu-vm scp "$archive" "$NAME:biomedlm.tar.gz" --zone="$ZONE" --worker=all
    # The hosts' own Python is too old: uv brings another one.
    on_hosts all 'set -e
        mkdir -p biomedlm && tar -xzf biomedlm.tar.gz -C biomedlm && cd biomedlm
        python3 -m pip install --quiet --user uv
        ~/.local/bin/uv venv --quiet --python 3.13 --allow-existing
        ~/.local/bin/uv pip install --quiet ".[tpu]"'
    on_hosts all "set -e
        command -v mount.nfs >/dev/null || { sudo apt-get update && sudo apt-get install -y nfs-common; }
        sudo mkdir -p /data
        mountpoint -q /data || sudo mount -t nfs $(printf %q "$NFS") /data
        sudo chown \$(id -u) /data"
}

start() {
    local arguments
    arguments=$(printf '%q ' "$@")
    # A unit of systemd outlives the connection, and gets SIGTERM and time to save when the host is shut down.
    on_hosts all "set -e
        sudo systemctl stop biomedlm 2>/dev/null || true
        sudo systemctl reset-failed biomedlm 2>/dev/null || true
        sudo systemd-run --unit=biomedlm --uid=\$(id -u) --working-directory=\$HOME/biomedlm --setenv=PYTHONUNBUFFERED=1 \
            --property=RemainAfterExit=yes --property=TimeoutStopSec=300 \
            .venv/bin/python -m biomedlm_jax.train $arguments"
}

delete() {
    do_it gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

# Waits for the end of what was started; true when there is nothing more to do.
watch() {
    local state
    while true; do
        state=$(pod_state)
        [ "$state" = ACTIVE ] || [ "$state" = UNKNOWN ] || { say "$NAME was preempted: $state"; return 1; }
        state=$(train_state)
        case $state in
            running | unknown) ;;
            0) say "train has ended well"; return 0 ;;
            2) say "a mistake in the settings or the data, see $0 logs; the slice is still there"; exit 2 ;;
            143) say "train was stopped and has saved"; return 1 ;;
            *)
                failures=$((failures + 1))
                say "train has failed with status $state ($failures of $max_failures times)"
                [ "$failures" -lt "$max_failures" ] || { say "giving up; the slice is still there"; exit 1; }
                return 1
                ;;
        esac
        sleep "$POLL_SECONDS"
    done
}

run() {
    local failures=0
    while true; do
        case $(pod_state) in
            ACTIVE) $dry_run && create ;;
            NONE) create || continue ;;
            FAILED | SUSPENDED) delete; continue ;;
            *) sleep "$POLL_SECONDS"; continue ;;
        esac
        install && start "$@" && watch && break
        sleep "$POLL_SECONDS"
    done
    delete
}

[ "${1-}" = --dry-run ] && { dry_run=true; shift; }
command=${1-}
[ $# -gt 0 ] && shift
case $command in
    run | create | install | start | logs | status | stop | delete) ;;
    *) usage; exit 2 ;;
esac
