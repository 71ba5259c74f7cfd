"""Imported first, by scripts and tests of this folder: where our modules are, and a Ray of this process's own."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "cluster")]

if "RAY_AUTH_TOKEN" not in os.environ:  # a script: under pytest, tests/conftest.py has done this
    from orchestrator.localcluster import isolate

    isolate()
    os.environ["OMP_NUM_THREADS"] = "1"
