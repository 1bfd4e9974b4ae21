# Every batch script reads this file before its srun. It applies the site's settings, and requeues a
# job whose run dies.
#
# A run that is told to stop saves and requeues itself. A run that fails by an error of its own
# writes $DICO_JOB.failed, and its job ends. After any other death, such as a killed process or a
# lost node, the job goes back into the queue and continues from its last checkpoint. After five
# restarts without progress it stays ended. Progress removes $DICO_JOB.restarts.
# shellcheck shell=bash disable=SC1091
source slurm/env.sh || {
    echo "error: slurm/env.sh failed; is this the repository's root?" >&2
    exit 2
}
: "${PYTHON:=.venv/bin/python}"
# A command that submits looks for results where it was called.
RESULTS=${SUBMITTED_FROM:-${RESULTS:-results}}
mkdir -p "$RESULTS/submissions" || {
    echo "error: $(hostname): cannot write results to $RESULTS; change RESULTS or --results" >&2
    exit 2
}
DICO_LOG=$(readlink -f "/proc/$$/fd/1")
export DICO_LOG
export DICO_JOB=$RESULTS/submissions/job-$SLURM_JOB_ID
rm -f "$DICO_JOB.failed"

# The last job of an array has the id of the whole array as its SLURM_JOB_ID.
queue_id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
queue_id=${queue_id:-$SLURM_JOB_ID}

# Try for five minutes: the controller may be restarting.
patiently() {
    local tries
    for ((tries = 1; tries <= 20; tries++)); do
        # A bare return would give the status from before the trap.
        timeout -k 5 60 "$@" && return 0
        sleep 15
    done
    return 1
}

# Whether the last heartbeat of the run says that it failed in this very job.
heartbeat_says_failed() {
    local folder
    folder=$(cat "$DICO_JOB.run" 2>/dev/null) || return 1
    "$PYTHON" - "$folder/heartbeat.json" "$SLURM_JOB_ID" 2>/dev/null <<'END'
import json, sys
with open(sys.argv[1]) as file:
    beat = json.load(file)
sys.exit(not (beat["state"] == "failed" and beat["job_id"] == sys.argv[2]))
END
}

requeue_after_death() {
    local status=$? state
    # Statuses from 128 on are signals; below, the run ended by its own decision.
    if [ $status -lt 128 ] || [ -e "$DICO_JOB.failed" ] || heartbeat_says_failed; then
        rm -f "$DICO_JOB".*
        exit $status
    fi

    # A job that is not running any more is cancelled or requeued already.
    state=$(patiently squeue -h -j "$queue_id" -o %T) || exit $status
    [ "$state" = RUNNING ] || exit $status

    echo "restart after status $status" >>"$DICO_JOB.restarts"
    if [ "$(wc -l <"$DICO_JOB.restarts")" -gt 5 ]; then
        echo "status $status after five restarts without progress: not restarted again" >&2
        rm -f "$DICO_JOB".*
        exit $status
    fi
    echo "the run died with status $status; back into the queue" >&2
    patiently scontrol requeue "$queue_id" || exit $status
    # The scheduler ends this script. Leaving first could make it count the job as finished.
    sleep 60
}
trap requeue_after_death EXIT

# Slurm repeats a signal that a node did not confirm in time, and numbers the steps of every attempt
# from 0. The repeated signal to a killed step would end the next attempt's step of the same number.
# An empty step before every second attempt gives the two attempts different numbers.
if ((${SLURM_RESTART_COUNT:-0} % 2)); then
    timeout -k 5 120 srun --nodes=1 --ntasks=1 --ntasks-per-node=1 true || true
fi
