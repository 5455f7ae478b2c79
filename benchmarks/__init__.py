"""Claims about speed, measured: `python -m benchmarks.NAME [--quick]`, all of them by `make bench`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a thread that waits does not burn a core
