"""Lets a test put a fault into real worker processes: this folder stands on the PYTHONPATH of the test's cluster.

When a worker's process imports trainer.loop, its `train_step` first runs the file `fault.py` of the folder that
SHEPHERD_TEST_FAULTS names, if there is one for the run, with `session` as its only name.
"""

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path


class _PatchLoop(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "trainer.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            train_step = module.train_step

            def faulty(session):
                fault = Path(os.environ["SHEPHERD_TEST_FAULTS"], f"{session.config.run}.py")
                if fault.exists():
                    exec(compile(fault.read_text(), str(fault), "exec"), {"session": session})
                return train_step(session)

            module.train_step = faulty

        spec.loader.exec_module = exec_module
        return spec


if "SHEPHERD_TEST_FAULTS" in os.environ:
    sys.meta_path.insert(0, _PatchLoop())
