"""Every test process has its own Ray, should it start one; this must come before anything imports Ray."""

import os

from orchestrator.localcluster import isolate

isolate()
os.environ["OMP_NUM_THREADS"] = "1"
