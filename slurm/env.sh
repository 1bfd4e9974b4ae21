# What differs between sites; every job sources this before its run. Uncomment and change.
# Source it also in the shell that submits or asks for --status, so that both speak of the same folders.
# shellcheck shell=bash disable=SC2034

# module load python cuda
# PYTHON=.venv/bin/python             # any Python that has the requirements
# export RESULTS=results              # a folder that every node sees; --results overrides it
# export DICO_DATA=data               # latents and labels
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# What slurm/site.toml sets for the trainer (checkpoint_every, micro_batch, compile and so on; not nodes, GPUs and time, which
# are in the scripts' headers) holds for the scripts too. So do these, which go before it:
# export DICO_SLURM_CHECKPOINT_EVERY=1000

# The scripts beside this file know no account. sbatch reads it, and what goes before their headers, from the shell that calls it
# (before what slurm/site.toml says to --cluster slurm too, which then warns):
# export SBATCH_ACCOUNT=... SBATCH_PARTITION=... SBATCH_QOS=... SBATCH_TIMELIMIT=... SBATCH_CONSTRAINT=... SBATCH_GPUS_PER_NODE=... SBATCH_MEM_PER_NODE=...
