# Sourced by every batch script before its srun: the site's settings, and what happens when the run dies.
#
# A run that is told to stop saves and requeues itself, and one that fails by an error of its own says so ($DICO_JOB.failed).
# Anything else that ends it (a killed process, a lost node's neighbours) puts the job back into the queue, where it goes
# on from its last checkpoint; after five restarts without progress, which removes $DICO_JOB.restarts, it stays ended.
# shellcheck shell=bash disable=SC1091
source slurm/env.sh || { echo "error: slurm/env.sh failed; is this the repository's root?" >&2; exit 2; }
: "${PYTHON:=.venv/bin/python}"
RESULTS=${SUBMITTED_FROM:-${RESULTS:-results}}  # what a command submitted goes where that command looks for it
mkdir -p "$RESULTS/submissions" || { echo "error: $(hostname): cannot write results to $RESULTS; change RESULTS or --results" >&2; exit 2; }
DICO_LOG=$(readlink -f "/proc/$$/fd/1")
export DICO_LOG
export DICO_JOB=$RESULTS/submissions/job-$SLURM_JOB_ID
rm -f "$DICO_JOB.failed"
queue_id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
queue_id=${queue_id:-$SLURM_JOB_ID}  # the last element of an array has the id of the whole array

patiently() {  # the controller may be restarting
    local tries
    for ((tries = 1; tries <= 20; tries++)); do
        timeout -k 5 60 "$@" && return 0  # in a trap, a bare return gives the status from before the trap
        sleep 15
    done
    return 1
}

failed_by_itself() {
    [ -e "$DICO_JOB.failed" ] || grep -qs "\"state\": \"failed\".*\"job_id\": \"$SLURM_JOB_ID\"" "$(cat "$DICO_JOB.run")/heartbeat.json"
}

requeue_after_death() {
    local status=$? state
    if [ $status -lt 128 ] || failed_by_itself; then
        rm -f "$DICO_JOB".*
        exit $status
    fi
    state=$(patiently squeue -h -j "$queue_id" -o %T) || exit $status
    [ "$state" = RUNNING ] || exit $status  # it is cancelled or requeued already
    echo "restart after status $status" >>"$DICO_JOB.restarts"
    if [ "$(wc -l <"$DICO_JOB.restarts")" -gt 5 ]; then
        echo "the run died again after five restarts without progress (status $status); not restarted" >&2
        rm -f "$DICO_JOB".*
        exit $status
    fi
    echo "the run died with status $status; back into the queue" >&2
    patiently scontrol requeue "$queue_id" || exit $status
    sleep 60  # the scheduler ends this script; leaving first could let it count the job as finished
}
trap requeue_after_death EXIT
# Slurm sends a signal again that a node did not confirm in time, and numbers the steps of every attempt from 0: that of a
# killed step would end the next attempt's. An empty step before every second attempt gives the two different numbers.
if ((${SLURM_RESTART_COUNT:-0} % 2)); then timeout -k 5 120 srun --nodes=1 --ntasks=1 --ntasks-per-node=1 true || true; fi
