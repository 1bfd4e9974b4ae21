#!/usr/bin/env bash
# Run a real Slurm with two virtual nodes on this machine, for tests.
#
#     DIR=/some/new/folder tests/slurm_cluster.sh start
#
#   start          start munged, slurmctld and one slurmd per node; return when both nodes are idle
#   env            print the line that makes this shell's sbatch, srun and squeue use it (for eval)
#   node-kill N    end node N (1 or 2) at once, with everything that runs on it
#   slurmd-kill N  end the slurmd of node N alone; its jobs live on, but Slurm hears nothing of them
#   node-start N   bring node N back
#   restart        end slurmctld at once and start it again
#   stop           end everything that this cluster started and remove its folder
#
# Works as root and as a user, without systemd and cgroups. All state is in $DIR, and every socket
# on this machine. Nodes claim 8 CPUs and 4 GPUs, whatever the machine has. Needs the packages
# slurm-wlm and munge of Debian or Ubuntu.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
DIR=${DIR:?the folder of the cluster}
host=$(hostname -s)
conf=$DIR/slurm.conf

fail() { echo "slurm_cluster: $1" >&2; exit 1; }
# A node is named by an address, so that its name resolves without an entry in /etc/hosts.
name() { echo "127.0.0.1$1"; }
port_is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
ports_are_free() {
    local port
    for port in "$1" $(($1 + 1)) $(($1 + 2)) $(($1 + 3)); do port_is_free "$port" || return 1; done
}

# A process is known by its id and its start time: an id alone may belong to somebody else by now.
born() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" {print $20}'; }
launch() {
    local label=$1
    shift
    SLURM_CONF=$conf setsid "$@" </dev/null >>"$DIR/log/$label.out" 2>&1 9>&- &
    echo "$! $(born $!)" >"$DIR/pid/$label"
}
alive() {
    local pid start
    read -r pid start <"$DIR/pid/$1" 2>/dev/null || return 1
    [ -n "$start" ] && [ "$(born "$pid")" = "$start" ] && echo "$pid"
}

# Print the ids of what runs on a node, or on all: job processes are known by their environment,
# step managers by the log file that they hold open.
running_on() {
    local node=${1:-127.0.0.1?} process file
    for process in /proc/[0-9]*; do
        if [[ $(readlink "$process/exe" 2>/dev/null) == */slurmstepd* ]]; then
            for file in "$process"/fd/*; do
                # shellcheck disable=SC2053 # the node may be a pattern
                if [[ $(readlink "$file" 2>/dev/null) == $DIR/log/slurmd.$node.log ]]; then
                    echo "${process#/proc/}"
                    break
                fi
            done
        elif grep -zqxF "SLURM_CONF=$conf" "$process/environ" 2>/dev/null; then
            if grep -zqx "SLURMD_NODENAME=${node/\?/.}" "$process/environ" 2>/dev/null; then
                echo "${process#/proc/}"
            fi
        fi
    done
    return 0
}

# End every process whose id is in a list, one id per line or word.
kill_all() {
    local pid
    for pid in $1; do kill -KILL "$pid" 2>/dev/null || true; done
}

write_conf() {
    local port=$1 bind="CommunicationParameters=NoCtldInAddrAny,NoInAddrAny" k
    # slurmctld binds to what the host's name resolves to.
    [ "$(getent ahostsv4 "$host" | awk 'NR == 1 {print $1}')" = 127.0.0.1 ] || bind=""
    # A GPU has to be a device.
    for k in 0 1 2 3; do ln -s /dev/null "$DIR/gpu$k"; done
    echo "Name=gpu File=$DIR/gpu[0-3]" >"$DIR/gres.conf"
    : >"$DIR/plugstack.conf"
    cat >"$conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its credential expires; less than 5 s counts as 120
AuthInfo=socket=$DIR/munge.socket,cred_expire=5
$bind
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool.%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
PlugStackConfig=$DIR/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
GresTypes=gpu
# ids of an earlier cluster would lead to its jobs' files
FirstJobId=$((1000 + $(date +%s) % 5000000 * 10))
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# shorter than MessageTimeout: else a signal to a step is sent again later, to the next attempt
KillWait=8
SlurmdTimeout=10
DefMemPerNode=4000
SlurmctldTimeout=10
MessageTimeout=10
ReturnToService=2
MinJobAge=300
AccountingStorageType=accounting_storage/none
NodeName=DEFAULT CPUs=8 RealMemory=64000 Gres=gpu:4 State=UNKNOWN
NodeName=$(name 1) NodeAddr=127.0.0.1 NodeHostname=$host Port=$((port + 2))
NodeName=$(name 2) NodeAddr=127.0.0.1 NodeHostname=$host Port=$((port + 3))
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
CONF
}

node_start() {
    mkdir -p "$DIR/spool.$(name "$1")"
    launch "slurmd.$1" slurmd -D -N "$(name "$1")" -f "$conf"
}
node_kill() { kill_all "$(alive "slurmd.$1") $(running_on "$(name "$1")")"; }

slurmd_kill() { kill_all "$(alive "slurmd.$1")"; }

idle_nodes() {
    SLURM_CONF=$conf timeout -k 1 5 sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l
}

start() {
    local program port=21000 tries
    for program in munged slurmctld slurmd sbatch srun; do
        command -v "$program" >/dev/null ||
            fail "$program is missing: apt-get install --no-install-recommends slurm-wlm munge"
    done
    mkdir "$DIR" || fail "$DIR has to be a new folder"
    mkdir "$DIR"/{log,pid,state}
    # Clusters that start at once would choose the same ports: each waits until the one before is up.
    exec 9>"${TMPDIR:-/tmp}/slurm_cluster.$(id -u).lock"
    flock 9
    until ports_are_free "$port"; do
        port=$((port + 4))
        [ "$port" -lt 22000 ] || fail "no free ports"
    done
    write_conf "$port"
    (umask 077 && head -c 128 /dev/urandom >"$DIR/munge.key")
    launch munged munged --foreground --force --group-check-mtime=0 \
        --key-file="$DIR/munge.key" --socket="$DIR/munge.socket" --seed-file="$DIR/munge.seed" \
        --pid-file="$DIR/munged.pid" --log-file="$DIR/log/munged.log"
    for ((tries = 0; tries < 100; tries++)); do
        if [ -S "$DIR/munge.socket" ]; then break; fi
        sleep 0.1
    done
    launch slurmctld slurmctld -D -i -f "$conf"
    node_start 1
    node_start 2
    for ((tries = 0; tries < 300; tries++)); do
        [ "$(idle_nodes)" = 2 ] && return
        sleep 0.1
    done
    tail -n 5 "$DIR"/log/* >&2
    stop
    fail "the nodes did not come up"
}

restart() {
    kill_all "$(alive slurmctld)"
    launch slurmctld slurmctld -D -f "$conf"
}

stop() {
    local label
    for label in slurmctld slurmd.1 slurmd.2; do kill_all "$(alive $label)"; done
    kill_all "$(running_on)"
    kill_all "$(alive munged)"
    rm -rf "$DIR"
}

case ${1:-} in
    start) start ;;
    env) echo "export SLURM_CONF='$conf'" ;;
    node-kill) node_kill "${2:?1 or 2}" ;;
    slurmd-kill) slurmd_kill "${2:?1 or 2}" ;;
    node-start) node_start "${2:?1 or 2}" ;;
    restart) restart ;;
    stop) [ -f "$conf" ] || fail "there is no cluster in $DIR"; stop ;;
    *) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
