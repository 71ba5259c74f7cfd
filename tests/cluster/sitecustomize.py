"""Lets a test change the real processes of its cluster, on whose PYTHONPATH this folder stands.

When a worker's process imports trainer.loop, its `train_step` first runs the file `<run>.py` of the folder that
SHEPHERD_TEST_FAULTS names, if there is one for the run, with `session` as its only name. When a controller's process
imports orchestrator.runtime.fanin while there is a file `fan-ins` in that folder, three nodes are many. An agent that
comes up while there is a file `impatient` there takes its controller for gone after ten seconds. A controller comes up
only when there is no file `late-controller`. The node whose raylet's process id stands in a file `wrong-node` there
computes wrong products when it is checked.

Where SHEPHERD_TEST_DEVICE is "cuda", all workers train on the first GPU. NCCL refuses ranks on one GPU unless it takes
them to be on different machines, so each says that it is on one of its own.

A command joins the Ray node with the address that SHEPHERD_TEST_NODE names; by itself Ray takes this machine's head.
"""

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path


def _patch_loop(module):
    train_step = module.train_step

    def faulty(session):
        fault = Path(os.environ["SHEPHERD_TEST_FAULTS"], f"{session.config.run}.py")
        try:
            text = fault.read_text()
        except FileNotFoundError:
            text = ""
        exec(compile(text, str(fault), "exec"), {"session": session})
        return train_step(session)

    module.train_step = faulty


def _patch_fan_in(module):
    if Path(os.environ["SHEPHERD_TEST_FAULTS"], "fan-ins").exists():
        module.FAN_IN_FROM_NODES, module.FAN_IN_NODES = 3, 2


def _patch_agent(module):
    if Path(os.environ["SHEPHERD_TEST_FAULTS"], "impatient").exists():
        module.ABANDONED_S = 10.0


def _wait_until_wanted(module):
    """Ray has started the process, and has not made the actor."""
    while Path(os.environ["SHEPHERD_TEST_FAULTS"], "late-controller").exists():
        time.sleep(0.2)


def _compute_wrong():
    import torch

    right = torch.Tensor.__matmul__
    torch.Tensor.__matmul__ = lambda a, b: right(a, b) + (1 if a.is_floating_point() else 0)


def _share_one_gpu(module):
    """Of trainer.worker: what it has imported by name is changed there."""
    from dataclasses import replace

    join, prepare = module.join, module.prepare

    def join_on_the_first(assign):
        os.environ.update({"NCCL_HOSTID": str(os.getpid()), "NCCL_SOCKET_IFNAME": "lo"})
        return join(replace(assign, local_rank=0))

    module.join = join_on_the_first
    module.prepare = lambda order: prepare(replace(order, local_rank=0))


class _Patch(importlib.abc.MetaPathFinder):
    """Runs `change` on a module that has just been imported."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.change(module)

        spec.loader.exec_module = exec_module
        return spec


def _join_the_node(module):
    init = module.init
    module.init = lambda *args, **kwargs: init(*args, _node_ip_address=os.environ["SHEPHERD_TEST_NODE"], **kwargs)


if "SHEPHERD_TEST_NODE" in os.environ:
    sys.meta_path.insert(0, _Patch("ray", _join_the_node))
if "SHEPHERD_TEST_FAULTS" in os.environ:
    sys.meta_path.insert(0, _Patch("trainer.loop", _patch_loop))
    sys.meta_path.insert(0, _Patch("orchestrator.runtime.fanin", _patch_fan_in))
    sys.meta_path.insert(0, _Patch("orchestrator.runtime.agent", _patch_agent))
    if any(word.endswith("default_worker.py") for word in sys.orig_argv):
        sys.meta_path.insert(0, _Patch("orchestrator.runtime.controller", _wait_until_wanted))
    if os.environ.get("SHEPHERD_TEST_DEVICE") == "cuda":
        sys.meta_path.insert(0, _Patch("trainer.worker", _share_one_gpu))
    wrong_node = Path(os.environ["SHEPHERD_TEST_FAULTS"], "wrong-node")
    is_check = "trainer.admission" in sys.orig_argv and wrong_node.exists()
    if is_check and wrong_node.read_text() == os.environ.get("RAY_RAYLET_PID"):
        _compute_wrong()
