"""One thread per process: spinning threads of tests that run side by side starve each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
