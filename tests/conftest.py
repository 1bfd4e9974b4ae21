"""One thread per process, one server of worker processes per test process, and kept bytecode.

Spinning threads of tests that run side by side starve each other. The server imports what workers
need once; it must know that before the first test starts it. Tests start some hundred processes:
where the environment forbids Python to keep bytecode, each of them would compile torch again.
"""

import gc
import multiprocessing
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
multiprocessing.set_forkserver_preload(
    [
        "experiments.engine.jobs.execute",
        "sklearn.datasets",
        "torch._dynamo",
        "torch.utils.tensorboard",
    ]
)


def pytest_collection_finish() -> None:
    """Keep imported libraries and collected tests, a million objects, out of garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let libraries free their objects when the interpreter ends; else they report leaks."""
    gc.unfreeze()
