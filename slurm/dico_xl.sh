#!/usr/bin/env bash
# Train and score DiCo-XL: table 8, protocol imagenet256_own.
# The comment is the id of the training, by which --status finds a job that waits.
#SBATCH --job-name=dico_xl --comment=ac2618f39620ad5c
#SBATCH --output=results/slurm-%x-%j.log --open-mode=append
#SBATCH --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR2@180 --requeue
source slurm/job.sh || exit 2
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" "$PYTHON" -u experiments/run.py \
    --table 8 --row DiCo-XL --protocol imagenet256_own --results "$RESULTS"
