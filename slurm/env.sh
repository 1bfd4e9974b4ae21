# The settings of this site. Every job reads this file before its run. Uncomment lines and change
# them. Read it (source slurm/env.sh) also in the shell that submits or asks for --status, so that
# jobs and commands use the same folders.
# shellcheck shell=bash disable=SC2034

# module load python cuda
# PYTHON=.venv/bin/python       # any Python that has the requirements
# export RESULTS=results        # a folder that every node can write; --results overrides it
# export DICO_DATA=data         # latents and labels
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# The trainer's keys of slurm/site.toml (checkpoint_every, micro_batch, compile, ...) hold for the
# scripts in this folder too. Nodes, GPUs and time do not: they stand in the scripts' headers.
# A variable DICO_SLURM_<KEY> overrides a key:
# export DICO_SLURM_CHECKPOINT_EVERY=1000

# The scripts name no account or partition. sbatch takes both from the shell that calls it. These
# variables override the scripts' headers. With --cluster slurm they override slurm/site.toml too,
# and the command warns of it.
# export SBATCH_ACCOUNT=... SBATCH_PARTITION=... SBATCH_QOS=... SBATCH_CONSTRAINT=...
# export SBATCH_TIMELIMIT=... SBATCH_GPUS_PER_NODE=... SBATCH_MEM_PER_NODE=...
