#!/usr/bin/env bash
# Runs a command inside a Slurm cluster of one machine: munged, slurmctld and slurmd with their state in a folder that is
# gone afterwards. No daemon of the system is touched. Needs root and Debian's packages slurmctld, slurmd, slurm-client,
# munge.
#
#   slurm_single_node.sh COMMAND ...
#
# The node has 4 CPUs, whatever the machine has. Partition `main` is preempted by `urgent`: its jobs get SIGTERM and
# $GRACE_S seconds (60), then are requeued.
set -euo pipefail

for program in munged slurmctld slurmd sbatch; do
  command -v "$program" >/dev/null || { echo "$program is missing (apt-get install slurmctld slurmd slurm-client munge)" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "slurmd starts jobs as root; run this as root" >&2; exit 1; }
[ $# -gt 0 ] || { echo "usage: $0 COMMAND ..." >&2; exit 1; }

state=$(mktemp -d /tmp/slurm.XXXXXX)
chmod 755 "$state"
started=()

stop() {
  scancel --quiet --user "$(id -un)" 2>/dev/null || true
  for ((i = ${#started[@]} - 1; i >= 0; i--)); do
    kill "${started[i]}" 2>/dev/null || true
    wait "${started[i]}" 2>/dev/null || true
  done
  rm -rf "$state"
}
trap stop EXIT

start() {  # start NAME COMMAND ...: a daemon in the foreground of a background job, so that its id is known
  "${@:2}" >"$state/$1.out" 2>&1 &
  started+=($!)
}

wait_for() {  # wait_for NAME COMMAND ...: until it succeeds
  for _ in $(seq 300); do
    "${@:2}" >/dev/null 2>&1 && return
    sleep 0.1
  done
  echo "$1 did not come up" >&2
  tail -n 20 "$state"/*.out "$state"/*.log >&2 || true
  exit 1
}

free_ports() {
  python3 - <<'TEXT'
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))
TEXT
}
read -r controller_port node_port < <(free_ports)

mkdir -m 700 "$state/munge"
mkdir -p "$state/run" "$state/ctld" "$state/d"
head -c 128 /dev/urandom >"$state/munge/key"
chmod 400 "$state/munge/key"
host=$(hostname -s)

cat >"$state/slurm.conf" <<TEXT
ClusterName=single
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$state/run/munge.socket
CredType=cred/munge
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/d
SlurmctldPidFile=$state/run/slurmctld.pid
SlurmdPidFile=$state/run/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE_S:-60} MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=$host PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
TEXT

export SLURM_CONF=$state/slurm.conf
start munged munged --foreground --force --key-file "$state/munge/key" --socket "$state/run/munge.socket" \
  --pid-file "$state/run/munged.pid" --seed-file "$state/munge/seed" --log-file "$state/munge/munged.log"
wait_for munged munge --socket "$state/run/munge.socket" --no-input
start slurmctld slurmctld -D -f "$SLURM_CONF"
start slurmd slurmd -D -f "$SLURM_CONF"
wait_for "the node" sh -c 'sinfo --noheader --format=%T | grep -q idle'
"$@"
