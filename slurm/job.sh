# Sourced by every batch script before its srun: the site's settings, and what happens when the run dies.
#
# A run that is told to stop saves and requeues itself, and one that fails by an error of its own says so ($DICO_JOB.failed).
# Anything else that ends it (a killed process, a lost node's neighbours) puts the job back into the queue, where it goes
# on from its last checkpoint; after five times without progress, which removes $DICO_JOB.restarts, it stays ended.
# shellcheck shell=bash disable=SC1091
source slurm/env.sh
: "${PYTHON:=.venv/bin/python}" "${RESULTS:=results}"
mkdir -p "$RESULTS/submissions"
export DICO_JOB=$RESULTS/submissions/job-$SLURM_JOB_ID
rm -f "$DICO_JOB.failed"

failed_by_itself() {
    [ -e "$DICO_JOB.failed" ] || grep -qs "\"state\": \"failed\".*\"job_id\": \"$SLURM_JOB_ID\"" "$(cat "$DICO_JOB.run")/heartbeat.json"
}

requeue_after_death() {
    local status=$? state
    if [ $status -lt 128 ] || failed_by_itself; then
        rm -f "$DICO_JOB".*
        exit $status
    fi
    state=$(timeout -k 5 60 squeue -h -j "$SLURM_JOB_ID" -o %T)
    [ "$state" = RUNNING ] || exit $status  # it is cancelled or requeued already
    echo "restart after status $status" >>"$DICO_JOB.restarts"
    if [ "$(wc -l <"$DICO_JOB.restarts")" -gt 5 ]; then
        echo "the run died five times without progress (status $status); not restarted" >&2
        rm -f "$DICO_JOB".*
        exit $status
    fi
    echo "the run died with status $status; back into the queue" >&2
    timeout -k 5 60 scontrol requeue "$SLURM_JOB_ID"
    sleep 60  # the scheduler ends this script; leaving first could let it count the job as finished
}
trap requeue_after_death EXIT
