#!/usr/bin/env bash
# Train and score DiCo-S: table 1, protocol imagenet256.
# The comment is the id of the training, by which --status finds a job that waits.
#SBATCH --job-name=dico_s --comment=e67ae123d484d7dc
#SBATCH --output=results/slurm-%x-%j.log --open-mode=append
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR2@180 --requeue
source slurm/job.sh || exit 2
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" "$PYTHON" -u experiments/run.py \
    --table 1 --row DiCo-S --protocol imagenet256 --results "$RESULTS"
