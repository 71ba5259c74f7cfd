"""Every test process has its own Ray, should it start one; this must come before anything imports Ray."""

import os

from hypothesis import HealthCheck, settings

from orchestrator.localcluster import isolate

isolate()
os.environ["OMP_NUM_THREADS"] = "1"

# The same cases each time, however slow the machine is; `--hypothesis-profile=default` draws new ones.
settings.register_profile(
    "gate", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gate")
