"""Stragglers: ranks that compute more slowly than their peers do. Pure: own times in, findings out.

Peers are the ranks of one pipeline stage: they do the same work on data of the same shape. (In a mesh that has shrunk
some replicas may take a microbatch more than others: peers are of those that take as many.) A rank's time is its own
(trainer/own_time.py): what it waits for others is not in it, so the one that keeps the mesh waiting is the one that
stands out, by its time over the median of its peers'.

Such a ratio is noise on a busy machine, and its mean is what matters. So evidence is summed up: a one-sided cumulative
sum (CUSUM; Page, "Continuous inspection schemes", Biometrika 41, 1954) of the ratios' logarithms over what is
tolerated, which forgets what has ended, and which among all rules with equally rare false alarms finds a lasting change
soonest in the worst case (Moustakides 1986).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field

WINDOW_STEPS = 4
"""Of a rank's steps the median counts: what strikes one of them, as a collection of garbage, does not."""
TOLERATED = 1.10
"""A rank that takes up to so many times as long as its peers is no straggler: hosts of one kind differ by some percent
(MegaScale found its slow ones 10% slower)."""
LARGEST = 1.5
"""The most that one window can weigh, so that no burst of other load, however hard, counts for more than it lasts."""
ENOUGH = 0.7
"""Of summed evidence. At a ratio of 1.2 it takes 9 windows (36 steps), at 1.3 it takes 5 (20), and never less than 3
(12). Where ratios of windows scatter by 9%, as on virtual machines, chance alone comes to it once in 10^7 windows."""
LASTING_US = 5_000_000
"""And at least so long, however short the steps are: other load comes and goes."""
OPEN_WINDOWS = 4
"""Windows of which some ranks have not told yet; ranks are at most a step apart."""


@dataclass(frozen=True, kw_only=True)
class Slow:
    """A finding; the event NodeSlow without its time and generation."""

    node: str
    slot: int
    workload: bool
    """Whether the slot was slow on another node, too: then it is not the node."""
    detail: str


@dataclass
class _Suspicion:
    """What speaks against one rank."""

    evidence: float = 0.0
    since_us: int = 0
    """How long it has."""
    windows: int = 0
    log_ratios: float = 0.0
    """Their sum over these windows."""
    named: bool = False

    def add(self, ratio: float, window_us: int) -> None:
        evidence = self.evidence + math.log(min(ratio, LARGEST)) - math.log(TOLERATED)
        if evidence <= 0:
            self.evidence, self.since_us, self.windows, self.log_ratios = 0.0, 0, 0, 0.0
            return
        self.evidence = min(evidence, 2 * ENOUGH)  # so that it forgets a long one's end as soon as it found its begin
        self.since_us += window_us
        self.windows += 1
        self.log_ratios += math.log(ratio)

    @property
    def is_proven(self) -> bool:
        return self.evidence >= ENOUGH and self.since_us >= LASTING_US

    @property
    def mean_ratio(self) -> float:
        return math.exp(self.log_ratios / self.windows)


@dataclass
class StragglerWatch:
    """One generation over all its ranks. Ranks are numbered stage by stage, and node by node."""

    nodes: tuple[str, ...]
    ranks: int
    stages: int
    slow_before: dict[int, str] = field(default_factory=dict)
    """Slot to the node on which it was slow; kept by the owner from one generation to the next."""
    loads: tuple[int, ...] = (1,)
    """Microbatches that each replica takes in a step; the replicas of a stage follow each other."""
    straggling_us: int = 0
    """What the mesh has waited for ranks that are named, and the owner has not accounted for yet."""
    _told: dict[int, tuple[dict[int, int], int]] = field(default_factory=dict)
    """Last step of a window to its ranks' own times and the longest wall-clock, of those that are not complete."""
    _suspicions: dict[int, _Suspicion] = field(init=False)
    _peers: list[list[int]] = field(init=False)
    """All ranks, by stage and load."""

    def __post_init__(self) -> None:
        per_stage = self.ranks // self.stages
        per_replica = per_stage // len(self.loads)
        groups: dict[tuple[int, int], list[int]] = {}
        for rank in range(self.ranks):
            load = self.loads[rank % per_stage // per_replica]
            groups.setdefault((rank // per_stage, load), []).append(rank)
        self._peers = list(groups.values())
        self._suspicions = {rank: _Suspicion() for rank in range(self.ranks)}

    def feed(self, step: int, own_us: dict[int, int], wall_us: int) -> list[Slow]:
        """Some ranks' median own times of a step, in the window that ends with `step`; what that completes.

        Args:
            wall_us: of the whole window.
        """
        told, longest_us = self._told.get(step, ({}, 0))
        told |= own_us
        self._told[step] = told, max(longest_us, wall_us)
        if len(told) < self.ranks:
            while len(self._told) > OPEN_WINDOWS:
                del self._told[min(self._told)]
            return []
        _, longest_us = self._told.pop(step)
        for peers in self._peers:
            self._judge({rank: told[rank] for rank in peers}, longest_us)
        return self._findings()

    def _judge(self, peers: dict[int, int], wall_us: int) -> None:
        if len(peers) < 2:
            return
        ordered = sorted(peers.values())
        behind_us = 0
        for rank, own_us in peers.items():
            others_us = max(1, _median_without(ordered, own_us))
            suspicion = self._suspicions[rank]
            suspicion.add(max(1, own_us) / others_us, wall_us)
            if suspicion.named and suspicion.evidence > 0:
                behind_us = max(behind_us, own_us - round(others_us))
        self.straggling_us += behind_us * WINDOW_STEPS

    def _findings(self) -> list[Slow]:
        proven = [rank for rank, s in self._suspicions.items() if s.is_proven and not s.named]
        found = []
        for rank in proven:
            self._suspicions[rank].named = True
            found.append(self._slow(rank))
        for finding in found:
            self.slow_before.setdefault(finding.slot, finding.node)
        return found

    def _slow(self, rank: int) -> Slow:
        per_node = self.ranks // len(self.nodes)
        place = rank // per_node
        node = self.nodes[place]
        before = self.slow_before.get(rank, node)
        neighbours = range(place * per_node, (place + 1) * per_node)
        slow = [each for each in neighbours if self._suspicions[each].evidence > ENOUGH / 2]
        suspicion = self._suspicions[rank]
        peers = next(len(group) - 1 for group in self._peers if rank in group)
        detail = (
            f"rank {rank} computes {suspicion.mean_ratio:.2f} times as long as its {peers} peers, "
            f"over {suspicion.windows * WINDOW_STEPS} steps; "
        )
        if before != node:
            detail += f"it was slow on {before}, too: it is the slot's work, not the node"
        elif per_node == 1:
            detail += "its node's only rank"
        elif len(slow) == per_node:
            detail += f"all {per_node} ranks of the node are slow: it is the node"
        else:
            detail += f"{len(slow)} of the node's {per_node} ranks: its core or device, or the slot's work"
        return Slow(node=node, slot=rank, workload=before != node, detail=detail)


def _median_without(ordered: list[int], one: int) -> float:
    """The median of an ascending list without one of its values, which has at least one more."""
    rest = len(ordered) - 1
    place = bisect_left(ordered, one)

    def at(index: int) -> int:
        return ordered[index if index < place else index + 1]

    return (at((rest - 1) // 2) + at(rest // 2)) / 2
