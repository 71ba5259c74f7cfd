"""Who hangs: the watch over a whole mesh, and whom it names. Pure: what its nodes tell of their ranks in, verdicts out.

A step ends with a sum over all ranks, so one rank that is stuck stalls every node, and each tells where its ranks stand
(`runtime/hangs.py`). Once all have, the ranks are named that do not wait while others wait for them. A node that still
moves, or is dead, never tells, and nobody is accused. Where all wait for each other, one that has left an exchange out
is named if the counts of exchanges, or torch's flight records, prove it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from orchestrator.runtime.hangs import PHASES, PULSE_US, STALE_US, Silent, Stalled, Standing

SETTLED_US = 1_200_000
"""A rank that has waited in one place for less, no longer than one pulse, may be on its way between two exchanges: it
does not count as waiting when somebody must be named."""
LATE_US = 500_000
"""A pulse on its way, and the age of what another node has told."""
WORLD_SUM = " _sum_over_ranks"
"""The function of the training loop in which all ranks meet, as it stands in a rank's telling frames."""
NAMED_MAX = 16
"""Ranks that one finding names, those furthest behind first; and numbers of ranks in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Hung:
    """A verdict; the event WorkerHung without its time."""

    node: str
    slot: int | None
    """None when nobody stands out; `node` is empty then."""
    step: int
    detail: str
    seen: tuple[str, int]
    """Node and rank whose stack is the evidence: who is named, or who is furthest behind."""
    recorded: tuple[tuple[str, int], ...] = ()
    """Nodes and ranks whose flight records are: the same one's, and that of one who waits for it."""


@dataclass
class MeshWatch:
    """One generation over all its nodes: what their watches tell in, verdicts out, each once."""

    nodes: tuple[str, ...]
    stage_ranks: int = 0
    """Ranks of a pipeline stage, which are numbered one after the other and do the same exchanges; 0: all of them."""
    _stalled: dict[str, Stalled] = field(default_factory=dict)
    _confirmed: set[str] = field(default_factory=set)
    """Nodes that have told it since all had: what the first of them told may be true no more."""
    _named: set[int | None] = field(default_factory=set)
    _over: bool = False

    def goes_on(self, node: str) -> None:
        """The node has made progress."""
        if self._stalled.pop(node, None) is not None:
            self._confirmed.clear()

    def has_lost_one(self) -> None:
        """A rank has failed or exited: from here on the others wait for it, and nobody hangs."""
        self._over = True

    def feed(self, node: str, report: Silent | Stalled) -> list[Hung]:
        """The verdicts that this report completes."""
        if self._over:
            return []
        if isinstance(report, Silent):
            return self._new([_silent(node, report.standing)])
        if not report.ranks:
            self.goes_on(node)
            return []
        self._stalled[node] = report
        if self._named or len(self._stalled) < len(self.nodes):
            return []
        self._confirmed.add(node)
        if len(self._confirmed) < len(self.nodes):
            return []
        return self._new(_blame(self._stalled, self.stage_ranks))

    def _new(self, verdicts: list[Hung]) -> list[Hung]:
        new = [verdict for verdict in verdicts if verdict.slot not in self._named]
        self._named |= {verdict.slot for verdict in new}
        return new


def _blame(stalled: dict[str, Stalled], stage_ranks: int) -> list[Hung]:
    """Who keeps the others waiting, when every node has come to a standstill."""
    nodes = {s.rank: node for node, report in stalled.items() for s in report.ranks}
    everyone = sorted((s for report in stalled.values() for s in report.ranks), key=_behind)
    long_us = max(report.stalled_us for report in stalled.values())
    if all(s.waited_us < SETTLED_US and s.groups for s in everyone):
        everyone = [replace(s, waited_us=s.recorded_us) for s in everyone]
    gaps = _gaps(everyone)

    def named(s: Standing, detail: str) -> Hung:
        told, others = _told_of(s, gaps)
        return _named(nodes[s.rank], s, detail + told, _recorded([s, *others], nodes))

    if any(s.waited_us >= _enough_us(stalled[nodes[s.rank]]) for s in everyone):
        free = [s for s in everyone if s.waited_us < SETTLED_US]
        waiting = len(everyone) - len(free)
        if free:
            return [named(s, _not_waiting(s, len(free), waiting, long_us)) for s in free[:NAMED_MAX]]
        said = f"all {waiting} ranks wait for each other"
        for s in _out_of_order(gaps, stage_ranks) or _out_of_step(everyone, stage_ranks):
            detail = f"rank {s.rank} is out of step with {waiting - 1} others, and all wait for each other, "
            return [named(s, f"{detail}no step for {_seconds(long_us)}; {_state(s)}")]
    elif all(report.hopeless for report in stalled.values()):
        said = "nobody waits long for anybody"
    else:
        return []
    last = everyone[0]
    detail = f"no step for {_seconds(long_us)}, and {said}; furthest behind is rank {last.rank}, {_state(last)}"
    told, others = _told_of_all(gaps)
    seen, recorded = (nodes[last.rank], last.rank), _recorded([last, *others], nodes)
    return [Hung(node="", slot=None, step=last.step, detail=detail + told, seen=seen, recorded=recorded)]


def _enough_us(report: Stalled) -> int:
    """How long one rank must have waited before those that do not are named.

    Its patience, less the pulse by which a wait is seen late; and so long that all others who wait are seen to, though
    they began a step later and their pulses come a pulse later.
    """
    return max(report.patience_us - PULSE_US, report.slowest_us + SETTLED_US + PULSE_US + LATE_US)


def _out_of_step(everyone: list[Standing], stage_ranks: int) -> list[Standing]:
    """The one rank that has left an exchange out, where that can be told; all wait for each other.

    Two patterns tell. In a process group inside a pipeline stage, whose members begin the same exchanges, one rank has
    begun fewer than the others, and waits elsewhere than they do; if they are a step ahead, it is they who went on. Or
    all others wait in one sum over the world, and it waits in another such sum, or has done more steps: it can have got
    there only past the others' sum.

    With more than one such rank, it may be the network or the program, and nobody is named.
    """
    groups: dict[tuple[int, str], list[Standing]] = {}
    stages: dict[str, set[int]] = {}
    for s in everyone:
        stage = _stage(s, stage_ranks)
        for name in s.exchanges:
            groups.setdefault((stage, name), []).append(s)
            stages.setdefault(name, set()).add(stage)
    missing: dict[int, Standing] = {}
    for (_, name), members in groups.items():
        most = max(s.exchanges[name] for s in members)
        first = [s for s in members if s.exchanges[name] == most]
        places, step = {s.where for s in first}, min(s.step for s in first)
        behind = [s for s in members if s.exchanges[name] < most and s.where not in places and s.step >= step]
        if len(stages[name]) == 1 and len(members) < len(everyone):
            missing |= {s.rank: s for s in behind}
    if missing:
        return list(missing.values()) if len(missing) == 1 else []
    crowds: dict[tuple[int, str], list[Standing]] = {}
    for s in everyone:
        crowds.setdefault((s.step, s.where), []).append(s)
    (step, where), crowd = max(crowds.items(), key=lambda each: len(each[1]))
    elsewhere = [s for s in everyone if s not in crowd]
    if WORLD_SUM not in where or len(elsewhere) != 1 or len(crowd) < 2:
        return []
    return [s for s in elsewhere if s.step > step or WORLD_SUM in s.where]


@dataclass(frozen=True, kw_only=True)
class _Gap:
    """A collective in which ranks wait, as the flight records tell. The ranks are the members of its group."""

    key: str
    """Of the group: transport and name."""
    what: str
    """Kind, number and group, for people."""
    inside: list[Standing]
    """Who waits in it."""
    otherwise: list[Standing]
    """Who waits in another collective of the same number."""
    absent: list[Standing]
    """Who has not begun it."""
    unknown: list[Standing]
    """Of whom nothing is known in this group."""

    @property
    def is_most(self) -> bool:
        """Whether more than one, and more than half of the group, wait in it."""
        others = len(self.otherwise) + len(self.absent) + len(self.unknown)
        return len(self.inside) > max(1, others)


def _gaps(everyone: list[Standing]) -> list[_Gap]:
    """Of each group in which ranks wait, the collective in which most of them do; those with the most come first."""
    members: dict[str, list[Standing]] = {}
    named: dict[str, list[Standing]] = {}
    for s in everyone:
        for key in s.groups:
            members.setdefault(key, []).append(s)
        for name in s.exchanges:
            named.setdefault(name, []).append(s)
    gaps = []
    for key, known in members.items():
        waits = Counter((r.waits, r.kind) for r in (s.groups[key] for s in known) if r.waits)
        if not waits:
            continue
        number, kind = max(waits, key=lambda each: (waits[each], -each[0]))
        about = known[0].groups[key].about
        group = f"{about} ({key})" if about else key
        come = [s for s in known if s.groups[key].waits == number]
        gaps.append(
            _Gap(
                key=key,
                what=f"{kind}, number {number} of group {group}",
                inside=[s for s in come if s.groups[key].kind == kind],
                otherwise=[s for s in come if s.groups[key].kind != kind],
                absent=[s for s in known if s.groups[key].begun < number],
                unknown=[s for s in named.get(key.partition(" ")[2], ()) if key not in s.groups],
            )
        )
    return sorted(gaps, key=lambda gap: -len(gap.inside))


def _out_of_order(gaps: list[_Gap], stage_ranks: int) -> list[Standing]:
    """The one rank that has left a collective out, or begun another, as the flight records prove it.

    Two patterns do. Where most members of a group wait in a collective, it waits in another of the same number. Or two
    ranks wait for each other: one in what most of a group wait in, the other in a collective of another group, and
    neither has begun the other's. One of the two has left out what it is waited for in. (A message that was lost looks
    otherwise: who waits for it waits in a collective that the others have begun.)

    With more than one such rank, it may be the program, and nobody is named.
    """
    odd: dict[int, Standing] = {}
    for gap in gaps:
        if gap.is_most:
            odd |= {s.rank: s for s in (*gap.otherwise, *_leavers(gap, stage_ranks))}
    return list(odd.values()) if len(odd) == 1 else []


def _leavers(gap: _Gap, stage_ranks: int) -> Iterator[Standing]:
    """Of each two ranks that wait for each other, `other` in this gap and `one` elsewhere, who has left one out.

    That is told by those in `other`'s stage that wait where it does: how many collectives they have begun in their
    groups of the kind in which `one` waits. Where they do not tell, the one that is a step ahead is on the wrong side
    of the step's end.
    """
    members: dict[str, list[Standing]] = {}
    usual: dict[tuple[int, str], Counter[int]] = {}
    for s in gap.inside:
        for key, record in s.groups.items():
            members.setdefault(key, []).append(s)
            usual.setdefault((_stage(s, stage_ranks), record.about), Counter())[record.begun] += 1
    for one in gap.absent:
        for key, record in one.groups.items():
            for other in members.get(key, ()):
                theirs = other.groups[key]
                if record.waits <= theirs.begun:
                    continue
                own = Counter(r.begun for r in other.groups.values() if r.about == theirs.about)
                begun = set(usual[_stage(other, stage_ranks), theirs.about] - own)
                if len(begun) == 1:
                    yield other if theirs.begun < begun.pop() else one
                elif one.step > other.step:
                    yield one


def _stage(s: Standing, stage_ranks: int) -> int:
    return s.rank // stage_ranks if stage_ranks else 0


def _told_of(s: Standing, gaps: list[_Gap]) -> tuple[str, list[Standing]]:
    """What flight records tell of this rank and those who wait for it, and one of those; nothing where they do not."""
    for gap in gaps:
        waiting = f"{len(gap.inside)} {'others wait' if len(gap.inside) > 1 else 'other waits'}"
        if s in gap.absent:
            others = [other for other in gap.absent if other is not s]
            nor = f", nor has {_ranks(others)}" if others else ""
            return f"; it has not begun {gap.what}, in which {waiting}{nor}", gap.inside[:1]
        if s in gap.otherwise:
            return f"; it waits in {s.groups[gap.key].kind} where {waiting} in {gap.what}", gap.inside[:1]
        if s in gap.unknown:
            return f"; {waiting} in {gap.what}, and of its own part nothing is known", gap.inside[:1]
    return "", []


def _told_of_all(gaps: list[_Gap]) -> tuple[str, list[Standing]]:
    """What flight records tell of those who wait for each other, and one or two of them."""
    for gap in gaps:
        if gap.absent:
            return f"; {_ranks(gap.inside)}: in {gap.what}, not begun by {_ranks(gap.absent)}", gap.inside[:1]
        if gap.otherwise:
            kind = gap.otherwise[0].groups[gap.key].kind
            told = f"; {_ranks(gap.inside)}: in {gap.what}, where {_ranks(gap.otherwise)}: in {kind}"
            return told, [gap.inside[0], gap.otherwise[0]]
    for gap in gaps:
        if not gap.unknown:
            return f"; all of the group have begun {gap.what}, and {len(gap.inside)} still wait in it", gap.inside[:1]
    return "", []


def _ranks(standings: list[Standing]) -> str:
    """Their numbers, for people."""
    numbers = sorted(s.rank for s in standings)
    more = f" and {len(numbers) - NAMED_MAX} more" if len(numbers) > NAMED_MAX else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:NAMED_MAX]))}{more}"


def _recorded(standings: list[Standing], nodes: dict[int, str]) -> tuple[tuple[str, int], ...]:
    """Nodes and ranks of those whose flight recorders have told something."""
    return tuple(dict.fromkeys((nodes[s.rank], s.rank) for s in standings if s.groups))


def _behind(standing: Standing) -> tuple[int, int, int]:
    return standing.step, PHASES.index(standing.phase), standing.rank


def _not_waiting(standing: Standing, free: int, waiting: int, stalled_us: int) -> str:
    others = f", nor do {free - 1} more" if free > 1 else ""
    return (
        f"rank {standing.rank} does not wait for anybody while {waiting} others do{others}, no step for "
        f"{_seconds(stalled_us)}; {_state(standing)}"
    )


def _silent(node: str, standing: Standing) -> Hung:
    return _named(node, standing, f"rank {standing.rank} hangs: {_state(standing)}")


def _named(node: str, standing: Standing, detail: str, recorded: tuple[tuple[str, int], ...] = ()) -> Hung:
    seen = (node, standing.rank)
    return Hung(node=node, slot=standing.rank, step=standing.step, detail=detail, seen=seen, recorded=recorded)


def _state(standing: Standing) -> str:
    place = f"last step {standing.step}, phase {standing.phase}, at {standing.where or 'an unknown place'}"
    if standing.silent_us <= STALE_US:
        return place
    status = {"stopped": "stopped (SIGSTOP)", "": "unknown"}.get(standing.status, standing.status)
    return f"silent for {_seconds(standing.silent_us)}, its process is {status}; {place}"


def _seconds(us: int) -> str:
    return f"{us / 1_000_000:.1f} s"
