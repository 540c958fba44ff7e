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

usage() { sed -n '2,/^# Environment/p' "$0" | sed 's/^# \{0,1\}//; $d' >&2; }
say() { echo "$(date +%T) $1" >&2; }
die() {
    echo "error: $1" >&2
    exit 2
}

# Runs a command, or prints it.
do_it() {
    if $dry_run; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# Runs a shell command on hosts of the slice: all, or one by its number.
on_hosts() { do_it gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"; }

# The queued resource's state: ACTIVE when the hosts are there, SUSPENDED after a preemption, NONE when there is none.
pod_state() {
    local state
    # A question that fails is no answer: only a list without it says that there is none.
    state=$(gcloud compute tpus queued-resources list --zone="$ZONE" --filter="name~/$NAME\$" \
        --format='value(state.state)') || { echo UNKNOWN && return; }
    echo "${state:-NONE}"
}

# train on one host: "running", "unknown" when the host does not answer, "gone" when it does not know of train (it was
# started anew), or the exit status of what has ended.
host_state() {
    local answer status
    answer=$(on_hosts "$1" 'systemctl show biomedlm --property=SubState,ExecMainCode,ExecMainStatus') ||
        { echo unknown && return; }
    status=$(sed -n 's/^ExecMainStatus=//p' <<<"$answer")
    case $answer in
        *SubState=exited* | *SubState=failed*)
            # ExecMainCode is 1 for an exit, and 2 or 3 for a signal.
            if grep -q '^ExecMainCode=[23]' <<<"$answer"; then status=$((128 + status)); fi
            echo "$status"
            ;;
        *SubState=dead*) echo gone ;;
        *) echo running ;;
    esac
}

create() {
    local state spot=()
    if [ "$SPOT" = 1 ]; then spot=(--spot); fi
    do_it gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${spot[@]}" || return 1
    if $dry_run; then return; fi
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
    local root archive
    root=$(cd "$(dirname "$0")/../.." && git rev-parse --show-toplevel) || die "$0 is not in a git checkout"
    archive=$(mktemp --suffix=.tar.gz) || return 1
    git -C "$root" archive --format=tar.gz --output="$archive" HEAD &&
        do_it gcloud compute tpus tpu-vm scp "$archive" "$NAME:biomedlm.tar.gz" --zone="$ZONE" --worker=all
    local status=$?
    rm -f "$archive"
    [ $status = 0 ] || return 1
    # The image's own Python is too old: uv brings another one.
    on_hosts all "set -e
        rm -rf biomedlm && mkdir biomedlm && tar -xzf biomedlm.tar.gz -C biomedlm && cd biomedlm
        python3 -m pip install --quiet --user uv
        ~/.local/bin/uv venv --quiet --python 3.13
        ~/.local/bin/uv pip install --quiet '.[tpu]'
        command -v mount.nfs >/dev/null || { sudo apt-get -q update && sudo apt-get -q install -y nfs-common; }
        sudo mkdir -p /data
        mountpoint -q /data || sudo mount -t nfs $(printf '%q' "$NFS") /data
        sudo chown \$(id -u) /data"
}

start() {
    # A unit of systemd outlives the connection, and has time to save when the host is shut down.
    on_hosts all "set -e
        sudo systemctl stop biomedlm 2>/dev/null || true
        sudo systemctl reset-failed biomedlm 2>/dev/null || true
        sudo systemd-run --unit=biomedlm --uid=\$(id -u) --working-directory=\$HOME/biomedlm \\
            --setenv=PYTHONUNBUFFERED=1 --property=RemainAfterExit=yes --property=TimeoutStopSec=300 \\
            \$HOME/biomedlm/.venv/bin/python -m biomedlm_jax.train$(printf ' %q' "$@")"
}

logs() { on_hosts 0 'journalctl --unit=biomedlm --follow --lines=1000 --output=cat'; }

status() {
    do_it gcloud compute tpus queued-resources list --zone="$ZONE" --filter="name~/$NAME\$"
    # shellcheck disable=SC2016  # the hosts shall expand it
    on_hosts all 'echo $(hostname) $(systemctl show biomedlm --property=SubState,ExecMainCode,ExecMainStatus)'
}

stop() { on_hosts all 'sudo systemctl stop biomedlm'; }

delete() { do_it gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet; }

# Waits for the end of what was started. Returns 0 when all steps are done, 1 when it must be started again; ends this
# script when another try would end the same way, or nobody wants one.
watch() {
    local state before=""
    while true; do
        state=$(pod_state)
        case $state in
            ACTIVE) ;;
            UNKNOWN)
                sleep "$POLL_SECONDS"
                continue
                ;;
            *)
                say "$NAME was preempted: $state"
                return 1
                ;;
        esac
        state=$(host_state 0)
        case $state in
            running | unknown) ;;
            0)
                say "all steps are done"
                return 0
                ;;
            2)
                say "a mistake in the settings or the data: see $0 logs. The slice is still there, and paid for"
                exit 2
                ;;
            143)
                # Either its host is being shut down, and soon does not answer any more, or a person has said stop.
                if [ "$before" = 143 ]; then
                    say "stopped and saved: $0 run goes on from there. The slice is still there, and paid for"
                    exit 143
                fi
                ;;
            *)
                failures=$((failures + 1))
                say "train has ended with $state, $failures of at most $max_failures times"
                if [ "$failures" -ge "$max_failures" ]; then
                    say "given up: see $0 logs. The slice is still there, and paid for"
                    exit 1
                fi
                return 1
                ;;
        esac
        before=$state
        sleep "$POLL_SECONDS"
    done
}

run() {
    local failures=0
    if $dry_run; then
        create && install && start "$@" && delete
        return
    fi
    while true; do
        case $(pod_state) in
            NONE) create || say "$NAME was not to be had" ;;
            ACTIVE) if install && start "$@" && watch; then break; fi ;;
            FAILED | SUSPENDED) delete || true ;; # no more hosts will come of it
        esac
        sleep "$POLL_SECONDS"
    done
    delete
}

if [ "${1-}" = --dry-run ]; then
    dry_run=true
    shift
fi
case ${1-} in
    run | create | install | start | logs | status | stop | delete) ;;
    *)
        usage
        exit 2
        ;;
esac
[ -n "$ZONE" ] || die "ZONE is not set: say where the slice shall be, for instance export ZONE=us-east5-a"
case $1 in
    run | install)
        [ -n "$NFS" ] || die "NFS is not set: run.dir must lie on a file system that all hosts share, for instance \
export NFS=10.0.0.2:/biomedlm of a Filestore instance in the same network"
        ;;
esac
"$@"
