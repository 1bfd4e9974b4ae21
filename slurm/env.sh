# What differs between sites; every job sources this before its run. Uncomment and change.
# shellcheck shell=bash disable=SC2034

# module load python cuda
# PYTHON=.venv/bin/python             # any Python that has the requirements
# RESULTS=results                     # a folder that every node sees
# export DICO_DATA=data               # latents and labels
# export NCCL_SOCKET_IFNAME=ib0

# The scripts beside this file know no account; sbatch reads it from the shell that calls it (source this file there):
# export SBATCH_ACCOUNT=... SBATCH_PARTITION=... SBATCH_QOS=...
