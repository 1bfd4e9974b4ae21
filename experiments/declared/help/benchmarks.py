"""What the help of `benchmark.py` says of each measurement."""

LOOP = """Count every registered network at its own input, and every row of Tables 3, 4 and 5, on
the meta device. Time `--report`, and tell whether it imports torch.

--main-job also runs `ablation.py --table 4` from nothing in a temporary folder, and prints its
seconds and its peak memory.
--checkpoints measures nothing but how long training stalls for a checkpoint: for the copy, and
for the writing beside it. It keeps a record of kind `stall`.
--neighbours times nothing but precision, recall, density and coverage, exactly and in ADM's
half-precision arithmetic, and keeps a record of each."""

LOADER = """Time the loader alone: latents of 32x32x4, drawn anew from moments, from a warm page
cache in two threads. The result is a record of kind `loader`."""

STEPS = """Time training and sampling steps of this suite beside those of another implementation.

    benchmark.py steps --against dico_s=dico_models.py:DiCo_S dit_s_2=models.py:DiT_S_2
    benchmark.py steps --networks dico_xl dit_xl_2 --device cuda --precision tf32 bf16 \\
        --compile --graphs

FILE:NAME is a constructor without arguments in a file of yours. Up to four steps run in turn, so
that the machine's drift cancels:

    ours    the trainer or the sampler, as runs use them
    bare    our network in the shortest loop; what `ours` takes longer is the suite's overhead.
            It is eager, and is left out if `ours` is compiled or captured
    plain   our network in a plain loop: iDDPM's loss, PyTorch's default AdamW, EMA by parameter
    theirs  the other network in that same plain loop, which this suite wrote, not its authors

A loop of sampling is ten guided steps on a GPU and two on a CPU; each step costs what one of 250
does. For training, the share of the device's measured matrix product is printed too; a step
counts as three forward passes. What the suite asks of itself, and by how much it is missed, is
printed and recorded.

A batch that does not fit a GPU's memory is halved. Every comparison is a record of kind `steps`,
whose spec has the batch that fitted. The record is a failed one if no batch fits, or if `ours`
does not compute what the reference kernels compute."""

KERNELS = """Time every kernel beside its reference and beside a copy of memory, forward and
backward, at 256 tokens and width 384.

All implementations that take the device's tensors and keep gradients run in turn in one process.
On a CPU these are the fast paths; on CUDA also the Triton kernels, and what is installed of
mamba-ssm, causal-conv1d, fla and flash-attn. An implementation that differs from the reference
is not timed.

Bandwidth counts the least that any implementation moves. Forward reads the inputs and writes the
output; backward reads the inputs and the output's gradient, and writes a gradient of every input.
Beside it stands what a plain copy reads and writes. Every implementation is a record of kind
`kernel`."""

GPU = """Run the GPU measurements, most important first, for nine minutes. Continue with
`--from PART`.

Nothing is installed. Copy the working tree to the machine and call this in its root, with any
Python that has torch, triton, timm and scipy, and pytest for the kernels' tests. Triton and
torch.compile need a C and a C++ compiler. Pure Python packages, such as pytest or fla-core for
DiG, can travel as wheels: put them on PYTHONPATH.

    benchmark.py gpu --minutes 9 --against dico_xl=theirs/models.py:DiCo_XL \\
        --bundle out/measured.tar.gz

Every stage's record is written when it ends. The bundle holds all records so far and is written
again every few seconds, so a cut costs one stage at most. To continue, unpack the bundle in the
results folder and call again with `--from` and the part that was cut off. What has a record is
not measured again, except steps and kernels. $DICO_COMMIT names the commit in the records of a
tree without history.

"""

SMALL = """Train the small networks of Table 4 in this tree and in another checkout of this suite,
in turn, each in a process and a thread of its own. Print by row how many times as many samples
this tree trains per core-second, and the geometric mean. With --stacked, the comparison is between
seeds of a row as one stacked network, whose batches PyTorch maps over the seeds, and one by one.

    git worktree add --detach ../before ae474e9
    benchmark.py small --against ../before
    benchmark.py small --stacked 4

Images have 8x8x1 pixels as in protocol digits, and 16x16x12 as CIFAR-10 with blocks of 2x2 pixels
folded into channels; their values are noise. Both sizes are records of kind `smalltrainings`, or
`stackedtrainings`."""
