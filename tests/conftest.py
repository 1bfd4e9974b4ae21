"""One thread per process, and one server of worker processes per test process.

Spinning threads of tests that run side by side starve each other. The server imports what workers
need once; it must know that before the first test starts it.
"""

import multiprocessing
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
multiprocessing.set_forkserver_preload(
    [
        "experiments.engine.jobs.execute",
        "sklearn.datasets",
        "torch._dynamo",
        "torch.utils.tensorboard",
    ]
)
