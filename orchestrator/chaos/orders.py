"""What chaos can be ordered, and what an order means for a run as it stands: names and bounds are checked here."""

from __future__ import annotations

import random
from dataclasses import dataclass

from orchestrator.core.events import FaultRequested
from orchestrator.core.state import State

NOT_DONE = "not done:"
"""How the detail of a fault begins that could not be done."""

SCENARIOS: dict[str, str] = {
    "worker-kill": "SIGKILL for one worker",
    "worker-stop": "SIGSTOP for one worker: it lives, and does nothing",
    "worker-exception": "an exception in one worker's training loop",
    "flip": "flipped bits in one rank's parameters or moments",
    "node-kill": "SIGKILL for a node's raylet and all under it, and its memory is gone",
    "controller-kill": "SIGKILL for the controller",
    "disk-full": "a ballast file fills the file system under run.url for a while",
}
OF_A_RANK = ("worker-kill", "worker-stop", "worker-exception", "flip")
TOLD_BY_THE_WORKER = ("worker-exception", "flip")
"""What the worker itself does, and tells."""
TENSORS = ("any", "model", "exp_avg", "exp_avg_sq")
PATTERNS = ("bit", "run", "zero")

MAX_SECONDS = 3600.0
"""A file system that is full for longer is an outage, not a test of one."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One fault as somebody asks for it. What is left open is drawn by `seed`."""

    scenario: str
    rank: int | None = None
    """The slot to hurt, for the scenarios OF_A_RANK."""
    node: str = ""
    """The node to hurt, for node-kill."""
    seed: int = 0
    tensors: str = "any"
    """For flip: one of TENSORS."""
    pattern: str = "bit"
    """For flip: one of PATTERNS."""
    seconds: float = 30.0
    """For disk-full: how long."""
    ballast_bytes: int = 10 * 2**30
    """For disk-full: a file system with more free space is not filled."""


def resolve(order: Order, state: State, world_size: int, by: str) -> FaultRequested:
    """The event that asks for `order` in a run whose state is `state`; without its time.

    Raises:
        ValueError: there is no such scenario, rank or node, or now is no time for it; the message says what to do.
    """
    if order.scenario not in SCENARIOS:
        raise ValueError(f"there is no scenario {order.scenario!r}: choose one of {', '.join(SCENARIOS)}")
    if state.job not in ("starting", "training", "halting"):
        raise ValueError(f"the run is {state.job}: chaos needs one that trains")
    chance = random.Random(order.seed)
    slot, node, parameters = None, "", {}
    if order.scenario in OF_A_RANK:
        slot = chance.randrange(world_size) if order.rank is None else order.rank
        if not 0 <= slot < world_size:
            raise ValueError(f"--rank {slot}: the run has ranks 0 to {world_size - 1}")
    elif order.rank is not None:
        raise ValueError(f"--rank is for {', '.join(OF_A_RANK)}, not for {order.scenario}")
    if order.scenario == "node-kill":
        alive = [name for name, n in state.nodes.items() if n.state != "lost"]
        node = order.node or chance.choice([name for name in state.mesh if name in alive] or alive)
        if node not in alive:
            raise ValueError(f"--node {node}: the run's nodes are {', '.join(alive)}")
    elif order.node:
        raise ValueError(f"--node is for node-kill, not for {order.scenario}")
    if order.scenario == "flip":
        parameters = {"tensors": order.tensors, "pattern": order.pattern, "seed": str(order.seed)}
        for name, known in (("tensors", TENSORS), ("pattern", PATTERNS)):
            if parameters[name] not in known:
                raise ValueError(f"--{name} {parameters[name]}: choose one of {', '.join(known)}")
    if order.scenario == "disk-full":
        if not 0 < order.seconds <= MAX_SECONDS:
            raise ValueError(f"--seconds {order.seconds:g}: give more than 0 and at most {MAX_SECONDS:g}")
        parameters = {"seconds": f"{order.seconds:g}", "ballast_bytes": str(order.ballast_bytes)}
    return FaultRequested(at=0, fault=order.scenario, node=node, slot=slot, parameters=parameters, by=by)
