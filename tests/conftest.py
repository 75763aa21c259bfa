"""All tests run with one thread: bit-equality is promised for equal threads, and small tensors are faster so."""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
