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
    "worker-segfault": "a bad memory access in one worker",
    "worker-lock": "one worker's interpreter is held for ever",
    "worker-loop": "one worker's reading of data loops for ever",
    "worker-slow": "one worker shares one core with others for a while",
    "memory": "one worker runs out of memory, up to a limit of its own",
    "flip": "flipped bits in one rank's parameters or moments",
    "two-kills": "SIGKILL for two workers of different nodes at once",
    "recovery-kill": "SIGKILL for one worker, and for another once the recovery from that is under way",
    "node-kill": "SIGKILL for a node's raylet and all under it, and its memory is gone",
    "net-cut": "a node's packets from or to the controller, its peers or all are dropped for a while",
    "net-delay": "a node's packets are late for a while",
    "clock-jump": "the wall clock of one process leaps",
    "store-outage": "the store behind run.url refuses the run's processes for a while",
    "disk-full": "a ballast file fills the file system under run.url for a while",
    "controller-kill": "SIGKILL for the controller",
    "head-kill": "SIGKILL for the head node's Ray processes and all under them, where the GCS has Redis",
}
OF_A_RANK = (
    "worker-kill",
    "worker-stop",
    "worker-exception",
    "worker-segfault",
    "worker-lock",
    "worker-loop",
    "worker-slow",
    "memory",
    "flip",
    "two-kills",
    "recovery-kill",
)
OF_A_NODE = ("node-kill", "net-cut", "net-delay")
PAIRS = ("two-kills", "recovery-kill")
"""Each is two faults: a worker-kill each."""
TOLD_BY_THE_WORKER = ("worker-exception", "worker-segfault", "worker-lock", "worker-loop", "memory", "flip")
"""What the worker itself does, and tells."""
ENDS_THE_CONTROLLER = ("controller-kill", "head-kill")
LASTING = ("worker-slow", "net-cut", "net-delay", "store-outage", "disk-full")
TENSORS = ("any", "model", "exp_avg", "exp_avg_sq")
PATTERNS = ("bit", "run", "zero")
PROCESSES = ("worker", "agent", "controller")
CUT_FROM = ("controller", "head", "peers", "all")
DIRECTIONS = ("both", "in", "out")

MAX_SECONDS = 3600.0
"""What is full, away or cut for longer is an outage, not a test of one."""
MAX_LEAP_S = 10 * 365 * 86_400.0
MAX_DELAY_MS = 10_000


@dataclass(frozen=True, kw_only=True)
class Order:
    """One fault as somebody asks for it. What is left open is drawn by `seed`."""

    scenario: str
    rank: int | None = None
    """The slot to hurt, for the scenarios OF_A_RANK; of PAIRS the first."""
    node: str = ""
    """The node to hurt, for the scenarios OF_A_NODE."""
    seed: int = 0
    tensors: str = "any"
    """For flip: one of TENSORS."""
    pattern: str = "bit"
    """For flip: one of PATTERNS."""
    seconds: float = 30.0
    """For LASTING ones: how long. For clock-jump: how far, and back if negative."""
    ballast_bytes: int = 10 * 2**30
    """For disk-full: a file system with more free space is not filled."""
    process: str = "worker"
    """For clock-jump: whose clock, one of PROCESSES."""
    cut_from: str = "peers"
    """For net-cut: one of CUT_FROM."""
    direction: str = "both"
    """For net-cut: one of DIRECTIONS, as seen from the node."""
    delay_ms: int = 200
    """For net-delay: by how much each packet that leaves the node is late."""


def resolve(order: Order, state: State, world_size: int, by: str) -> tuple[FaultRequested, ...]:
    """The events that ask for `order` in a run whose state is `state`; without their times.

    Raises:
        ValueError: there is no such scenario, rank or node, or now is no time for it; the message says what to do.
    """
    if order.scenario not in SCENARIOS:
        raise ValueError(f"there is no scenario {order.scenario!r}: choose one of {', '.join(SCENARIOS)}")
    if state.job not in ("starting", "training", "halting"):
        raise ValueError(f"the run is {state.job}: chaos needs one that trains")
    chance = random.Random(order.seed)
    parameters = _parameters(order)
    of_a_worker = order.scenario == "clock-jump" and order.process == "worker"
    slot = _slot(order, world_size, chance) if order.scenario in OF_A_RANK or of_a_worker else None
    if slot is None and order.rank is not None:
        raise ValueError(f"--rank is for {', '.join(OF_A_RANK)}, not for {order.scenario}")
    of_an_agent = order.scenario == "clock-jump" and order.process == "agent"
    node = _node(order, state, chance) if order.scenario in OF_A_NODE or of_an_agent else ""
    if not node and order.node:
        raise ValueError(f"--node is for {', '.join(OF_A_NODE)}, not for {order.scenario}")
    if order.scenario in PAIRS:
        assert slot is not None
        return _two_kills(order, state, world_size, slot, chance, by)
    return (FaultRequested(at=0, fault=order.scenario, node=node, slot=slot, parameters=parameters, by=by),)


def _slot(order: Order, world_size: int, chance: random.Random) -> int:
    slot = chance.randrange(world_size) if order.rank is None else order.rank
    if not 0 <= slot < world_size:
        raise ValueError(f"--rank {slot}: the run has ranks 0 to {world_size - 1}")
    return slot


def _node(order: Order, state: State, chance: random.Random) -> str:
    alive = [name for name, n in state.nodes.items() if n.state != "lost"]
    node = order.node or chance.choice([name for name in state.mesh if name in alive] or alive)
    if node not in alive:
        raise ValueError(f"--node {node}: the run's nodes are {', '.join(alive)}")
    return node


def _two_kills(
    order: Order, state: State, world_size: int, first: int, chance: random.Random, by: str
) -> tuple[FaultRequested, ...]:
    """The second is of another node, where there is one."""
    slots = world_size // len(state.mesh)
    others = [slot for slot in range(world_size) if slot // slots != first // slots]
    others = others or [slot for slot in range(world_size) if slot != first]
    if not others:
        raise ValueError(f"{order.scenario} needs two ranks, and the run has one")
    during = {"during": "recovery"} if order.scenario == "recovery-kill" else {}
    pair: tuple[tuple[int, dict[str, str]], ...] = ((first, {}), (chance.choice(others), during))
    return tuple(
        FaultRequested(at=0, fault="worker-kill", node="", slot=slot, parameters=parameters, by=by)
        for slot, parameters in pair
    )


def _parameters(order: Order) -> dict[str, str]:
    """What of the order is not who is hurt, each checked."""

    def one_of(option: str, value: str, known: tuple[str, ...]) -> str:
        if value not in known:
            raise ValueError(f"--{option} {value}: choose one of {', '.join(known)}")
        return value

    if order.scenario in LASTING and not 0 < order.seconds <= MAX_SECONDS:
        raise ValueError(f"--seconds {order.seconds:g}: give more than 0 and at most {MAX_SECONDS:g}")
    seconds = {"seconds": f"{order.seconds:g}"}
    match order.scenario:
        case "flip":
            tensors = one_of("tensors", order.tensors, TENSORS)
            return {"tensors": tensors, "pattern": one_of("pattern", order.pattern, PATTERNS), "seed": str(order.seed)}
        case "disk-full":
            return seconds | {"ballast_bytes": str(order.ballast_bytes)}
        case "clock-jump":
            if not 0 < abs(order.seconds) <= MAX_LEAP_S:
                raise ValueError(f"--seconds {order.seconds:g}: a leap is not 0, and at most {MAX_LEAP_S:g} either way")
            return seconds | {"process": one_of("process", order.process, PROCESSES)}
        case "net-cut":
            cut_from = one_of("from", order.cut_from, CUT_FROM)
            return seconds | {"from": cut_from, "direction": one_of("direction", order.direction, DIRECTIONS)}
        case "net-delay":
            if not 0 < order.delay_ms <= MAX_DELAY_MS:
                raise ValueError(f"--delay-ms {order.delay_ms}: give more than 0 and at most {MAX_DELAY_MS}")
            return seconds | {"delay_ms": str(order.delay_ms)}
        case "worker-slow" | "store-outage":
            return seconds
    return {}
