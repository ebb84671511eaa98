#!/usr/bin/env bash
# A real Slurm of two nodes on this machine, for tests: needs slurmctld, slurmd and munged, no systemd, no cgroups, no root.
#
#   tests/integration/slurm_loopback.sh up DIR      configuration, sockets and logs in DIR; prints DIR/slurm.conf
#   tests/integration/slurm_loopback.sh down DIR
#
# Then SLURM_CONF=DIR/slurm.conf sinfo. Both nodes are this machine, 127.0.0.1 and 127.0.0.2, each with 8 CPUs and 8 GPUs
# in name only. Jobs in `high` preempt those in `low`, the default, which have 30 seconds and are queued again by Slurm, and
# those in `spare`, which are cancelled.
set -euo pipefail
action=$1 dir=$(mkdir -p "$2" && cd "$2" && pwd)
export SLURM_CONF=$dir/slurm.conf
PATH=$PATH:/usr/sbin
nodes=(127.0.0.1 127.0.0.2)

stop() {
  local name process
  for name in "${nodes[@]/#/slurmd.}" slurmctld munged; do
    if ! process=$(cat "$dir/$name.pid" 2> /dev/null); then continue; fi
    kill "$process" 2> /dev/null || true
    for _ in $(seq 100); do
      if ! kill -0 "$process" 2> /dev/null; then break; fi
      sleep 0.1
    done
  done
}

if [ "$action" = down ]; then stop; exit; fi

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

me=$(id -un)
mkdir -p "$dir/state" "${nodes[@]/#/$dir/spool.}"
chmod 700 "$dir"
if [ ! -f "$dir/munge.key" ]; then (umask 077; head -c 1024 /dev/urandom > "$dir/munge.key"); fi
cat > "$dir/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=localhost
SlurmctldPort=$(free_port)
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=0
ReturnToService=2
KillWait=10
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=127.0.0.1 Port=$(free_port) CPUs=8 Gres=gpu:8
NodeName=127.0.0.2 Port=$(free_port) CPUs=8 Gres=gpu:8
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30 PreemptMode=REQUEUE
PartitionName=spare Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=0 PreemptMode=CANCEL
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
CONF
for i in {0..7}; do ln -sf /dev/null "$dir/gpu$i"; done
echo "Name=gpu File=$dir/gpu[0-7]" > "$dir/gres.conf"

munged --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" \
  --seed-file="$dir/munged.seed" --force
slurmctld -c
for node in "${nodes[@]}"; do slurmd -N "$node"; done
for _ in $(seq 60); do
  if [ "$(sinfo -h -N -p low -t idle -o %N 2> /dev/null | wc -l)" = 2 ]; then echo "$SLURM_CONF"; exit; fi
  sleep 0.5
done
stop
echo "the nodes did not come up; $dir/slurmctld.log ends:" >&2
tail -n 20 "$dir/slurmctld.log" >&2
exit 1
