"""What the world of core_body.py is made of: the tape of choices, nodes with their memory, meshes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from orchestrator.core import actions as ac
from orchestrator.core.events import Layout, Snapshot
from trainer.contract import Degrees


def layout(
    pp: int,
    dp_replicate: int,
    dp_shard: int,
    tp: int,
    slots_per_node: int,
    spares: int,
    shrinks_to: tuple[int, ...] = (),
    fallbacks: tuple[Degrees, ...] = (),
) -> Layout:
    slots = pp * dp_replicate * dp_shard * tp
    return Layout(
        pp=pp,
        dp_replicate=dp_replicate,
        dp_shard=dp_shard,
        tp=tp,
        slots_per_node=slots_per_node,
        nodes=slots // slots_per_node,
        spares=spares,
        shrinks_to=shrinks_to,
        fallbacks=fallbacks,
    )


LAYOUTS = (
    layout(1, 2, 1, 1, 1, 1),
    layout(1, 1, 1, 1, 1, 0),
    layout(1, 1, 2, 2, 2, 2, fallbacks=(Degrees(tp=2),)),
    layout(2, 2, 1, 1, 2, 1),
    layout(1, 2, 2, 1, 1, 0),
    layout(1, 3, 1, 1, 1, 0, shrinks_to=(2, 1)),
    layout(2, 2, 2, 1, 2, 1, shrinks_to=(1,), fallbacks=(Degrees(dp_replicate=2),)),
)
CAPABILITIES = (
    ("ram", "peer", "verify"),
    ("ram", "peer", "buddy", "park", "probe", "third", "verify"),
    ("ram", "peer"),
    ("ram",),
    ("verify",),
    (),
)


class Tape:
    """A finite source of choices; every choice is 0, the kindest, once it has run out."""

    def __init__(self, choices: bytes) -> None:
        self._choices: Iterator[int] = iter(choices)
        self.ended = False

    def below(self, n: int) -> int:
        """A number in [0, n)."""
        high, low = next(self._choices, None), next(self._choices, 0) if n > 16 else 0
        if high is None:
            self.ended, high = True, 0
        return (256 * high + low) * n // 65536


@dataclass
class SimNode:
    name: str
    alive: bool = True
    mute: bool = False
    """The whole node hangs: it runs no orders and sends nothing."""
    generation: int = 0
    slots: dict[int, bool] = field(default_factory=dict)
    """Slot to whether its worker lives, in `generation`."""
    hung: dict[int, bool] = field(default_factory=dict)
    """Slots whose worker lives but does nothing any more, and whether its agent has told so."""
    ram: dict[int, list[Snapshot]] = field(default_factory=dict)
    """Slot to complete snapshots, the oldest first."""

    @property
    def well(self) -> bool:
        return self.alive and not self.mute and bool(self.slots) and all(self.slots.values()) and not self.hung

    def snapshots(self) -> dict[int, tuple[Snapshot, ...]]:
        return {slot: tuple(held) for slot, held in self.ram.items()}


@dataclass
class Running:
    """The newest generation that was opened."""

    order: ac.OpenGeneration
    phase: str = "starting"
    """Then "training", "finished"."""
    step: int = 0
    told: int = 0
    stop: bool = False
    saving: int | None = None
    """The step of the save that is being written while training goes on."""
    saved: int = -1
    flipped: set[int] = field(default_factory=set)
    """Slots whose state has changed at rest since `step`."""
    diverged: set[int] = field(default_factory=set)
    """Slots whose state differs from their replicas' since `step`."""
    stalled: bool = False
    """No rank makes progress, and none stands out."""
    stall_told: bool = False
