"""Hangs: who lives, but shows no sign of life or makes no progress. Pure: durations and messages in, findings out.

Two findings, both from what a node sees of its own ranks:

- *silent*: no message of a rank for `rank_silence_us`. Its process is stopped, or its loop never lets go of the
  interpreter.
- *stalled*: no rank of the node has made progress (a step, a phase) for longer than the run's own pace explains.
  Because a step ends with a sum over all ranks, one rank that is stuck stalls every node, and each tells where its
  ranks stand. Once all have, `MeshWatch` names the ranks that do not wait while others wait for them. A node that
  still moves, or is dead, never tells, and nobody is accused.

Where torch has a flight recorder, it tells which collectives each rank has begun in which group. It is read shortly
before a stall is told, says in the verdict what the others wait in, and names a rank where all wait for each other.

Each agent measures durations on its own clock, and only while it attends to it: the time in which the agent itself
stood still counts for nothing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from trainer import contract

PULSE_US = 1_000_000
"""Between two pulses of a rank (trainer/pulse.py): so much later it may be seen to wait than it does."""
LOOK_US = 200_000
"""Between two looks of a watch: it adds to what a finding takes, twice where all nodes have to confirm it."""
REPEAT_US = 1_000_000
"""Between two looks where a finding stands: thousands of nodes may tell the same."""
EAGER_LOOKS = 25
"""So many looks tell a finding until it counts as one that stands."""
ATTENTION_US = 2_000_000
"""The most that one look adds to a watch's clock. What an agent has missed longer it has not seen."""
STALE_US = 4_500_000
"""A rank whose last pulse is older than this cannot be said to wait still."""
SETTLED_US = 1_200_000
"""A rank that has waited in one place for less, no longer than one pulse, may be on its way between two exchanges: it
does not count as waiting when somebody must be named."""
LATE_US = 500_000
"""A pulse on its way, and the age of what another node has told."""
PACE_FACTOR = 3
"""Patience over the slowest of the recent steps: a stall within it may be a garbage collection, a cold file, a burst of
other load."""
PACE_STEPS = 32
"""Recent steps whose pace counts, so that a slow start is forgotten; and so many that began a durable save, which are
rare and slower, and so many validation batches."""
WAIT_SHARE = 0.75
"""Of the collective time-out: who has waited for so long will fail soon, and then nobody can be named."""
READ_AHEAD_US = 2_000_000
"""Flight recorders are read so long before a stall is told, and so often until it ends: an answer takes a tenth."""
WORLD_SUM = " _sum_over_ranks"
"""The function of the training loop in which all ranks meet, as it stands in a rank's telling frames."""
NAMED_MAX = 16
"""Ranks that one finding names, those furthest behind first; and numbers of ranks in a sentence."""

# What a rank does between two steps, in order: who stands further to the left is behind.
_PHASES = ("rendezvous", "build", "restore", "checkpoint", "validate", "compute", "finished")
# The generation's start has its own deadline, and the controller's clock.
_START = _PHASES[:3]


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long what may last; from the spec's [recovery]."""

    rank_silence_us: int
    stall_floor_us: int
    start_us: int
    """For what has no known pace: the first step of the first generation, or after one that made none, and the first
    validation."""
    save_us: int
    """For the last save, which waits for the store alone and not for `collective_us`: beyond its own deadline."""
    collective_us: int
    waits_unseen: bool = False
    """Whether ranks wait where their pulses cannot tell it from work, as scripts do on accelerators."""


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A rank's process as its node sees it now."""

    status: str
    """As psutil calls it: running, sleeping, stopped and so on."""
    unread: bool
    """Whether it has sent what nobody has read: then it is not the one who is silent."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a rank stands."""

    rank: int
    step: int
    phase: str
    where: str
    """As its last pulse told."""
    waited_us: int
    """How long it has been waiting for others in one place; 0 when it does not wait."""
    silent_us: int
    status: str
    """Of its process, if that was looked at: of one that is silent it is."""
    exchanges: dict[str, int] = field(default_factory=dict)
    """How many it has begun in this generation, by process group."""
    groups: dict[str, contract.GroupRecord] = field(default_factory=dict)
    """What its flight recorder tells, by transport and process group; empty: nothing was read of it."""
    recorded_us: int = 0
    """How long, by that, it has been waiting for others, where pulses cannot tell."""


@dataclass(frozen=True, kw_only=True)
class Silent:
    """A report, repeated while it is true: one rank has fallen silent."""

    generation: int
    standing: Standing


@dataclass(frozen=True, kw_only=True)
class Stalled:
    """A report, repeated while it is true: no rank of the node makes progress."""

    generation: int
    ranks: tuple[Standing, ...]
    """Empty: the node goes on after all."""
    stalled_us: int
    patience_us: int
    """For one who waits for others."""
    slowest_us: int
    """The slowest of the recent steps: so much later than another rank one may have begun to wait."""
    hopeless: bool
    """Whether it has lasted too long even if nobody waits for anybody."""


def is_momentary(report: object) -> bool:
    """Whether a report is told again while it is true, and must not be told any more when it is not."""
    return isinstance(report, Silent) or (isinstance(report, Stalled) and bool(report.ranks))


def suspects(found: Iterable[Silent | Stalled]) -> list[int]:
    """The ranks of a node whose stacks may become evidence."""
    ranks: dict[int, None] = {}
    for report in found:
        standings = (report.standing,) if isinstance(report, Silent) else report.ranks
        ranks |= dict.fromkeys(standing.rank for standing in standings)
    return list(ranks)


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
class _Rank:
    """What a watch knows of one rank; times on the watch's clock."""

    progress_at: int
    heard_at: int | None = None
    """None before its first message: until then the generation's start deadline watches over it."""
    phase: str = "rendezvous"
    step: int = 0
    where: str = ""
    exchanges: dict[str, int] = field(default_factory=dict)
    waits_since: int | None = None
    stepped: bool = False
    """Whether it has completed a step in this generation."""
    trains_since: int | None = None
    """When its start was over."""
    groups: dict[str, contract.GroupRecord] = field(default_factory=dict)
    """What its flight recorder has told, as long as it has begun no other exchange."""
    recorded_at: int = 0
    asked_at: int | None = None
    """When its recorder was last to be read in this standstill."""

    def silent_us(self, clock: int) -> int:
        return 0 if self.heard_at is None else clock - self.heard_at

    def waited_us(self, clock: int) -> int:
        return 0 if self.waits_since is None or self.silent_us(clock) > STALE_US else clock - self.waits_since

    def recorded_us(self, clock: int) -> int:
        then_us = max((record.waited_us for record in self.groups.values()), default=0)
        if then_us == 0 or self.silent_us(clock) > STALE_US or clock - self.recorded_at > 2 * READ_AHEAD_US:
            return 0
        return min(then_us + clock - self.recorded_at, clock - self.progress_at)


class NodeWatch:
    """The ranks of one node in one generation. `now_us` is any monotonic clock of the caller's.

    Args:
        patience: the owner gives another when the job is another.
        first_us: how long the first step has taken on this node in generations before; 0: not known.
    """

    def __init__(
        self, generation: int, ranks: tuple[int, ...], patience: Patience, now_us: int, first_us: int = 0
    ) -> None:
        self.generation = generation
        self.patience = patience
        self._ranks = {rank: _Rank(progress_at=0) for rank in ranks}
        self._clock = 0
        self._ticked_at = now_us
        self._over = False
        self._stalled = False
        self._telling_looks = 0
        """How many looks in a row have found something."""
        self._first_before_us = first_us
        self.first_us = 0
        """How long the first step has taken, from the end of the start on; 0 while none is done."""
        self._pace: dict[str, deque[tuple[int, int]]] = {}
        """Phase to (step, slowest rank's duration) of its recent passes."""

    def hear(self, now_us: int, message: contract.FromWorker) -> None:
        """A message of one of the ranks has come."""
        clock = self._clock + self._attended(now_us)
        rank = self._ranks[message.rank]
        rank.heard_at = clock
        match message:
            case contract.Pulse():
                if message.step > rank.step:
                    self._progress(rank, clock)
                if not message.waiting:
                    rank.waits_since = None
                elif rank.waits_since is None or message.where != rank.where:
                    rank.waits_since = clock
                if message.exchanges != rank.exchanges:
                    rank.groups = {}
                rank.step, rank.where, rank.exchanges = message.step, message.where, message.exchanges
            case contract.Recorded():
                rank.groups, rank.recorded_at = message.groups, clock
            case contract.Phase():
                if rank.phase == "validate":  # told with each batch
                    self._learn("validate", rank.step, clock - rank.progress_at)
                rank.phase, rank.step = message.phase, message.step
                if rank.trains_since is None and rank.phase not in _START:
                    rank.trains_since = clock
                self._progress(rank, clock)
            case contract.StepDone():
                self._learn("save" if message.save_us else "compute", message.step, message.step_us)
                if not rank.stepped and rank.trains_since is not None:
                    self.first_us = max(self.first_us, clock - rank.trains_since)
                rank.step, rank.stepped = message.step, True
                self._progress(rank, clock)
            case contract.Finished():
                rank.phase = "finished"
                self._progress(rank, clock)
            case contract.Failed():
                self._over = True  # its end is the cause of whatever the others wait for
            case _:
                pass

    def exited(self, rank: int, in_good_order: bool) -> None:
        """A rank's process has ended."""
        self._ranks.pop(rank, None)
        self._over |= not in_good_order

    def tick(self, now_us: int, look: Callable[[int], Sighting | None]) -> list[Silent | Stalled]:
        """What is to be told now; call it again after `pause_us`. `look` sees a rank's process; None: it has ended."""
        was_away = now_us - self._ticked_at > ATTENTION_US
        self._clock += self._attended(now_us)
        self._ticked_at = now_us
        if self._over or not self._ranks:
            return []
        found = [*self._silent(look), *self._standstill(look, was_away)]
        self._telling_looks = self._telling_looks + 1 if any(map(is_momentary, found)) else 0
        return found

    @property
    def pause_us(self) -> int:
        """Until the next look."""
        return LOOK_US if self._telling_looks < EAGER_LOOKS else REPEAT_US

    def unread_recorders(self) -> list[int]:
        """Ranks whose flight recorders are to be read now: the node's standstill is told, or soon will be."""
        if self._over or not self._ranks or self._stalled_us() <= self._longest_patience_us() - READ_AHEAD_US:
            return []
        unread = []
        for number, rank in self._ranks.items():
            asked = rank.asked_at is not None and self._clock - rank.asked_at < READ_AHEAD_US
            if not (asked or rank.phase in _START):
                rank.asked_at = self._clock
                unread.append(number)
        return unread

    def _attended(self, now_us: int) -> int:
        return min(now_us - self._ticked_at, ATTENTION_US)

    def _progress(self, rank: _Rank, clock: int) -> None:
        rank.progress_at, rank.waits_since = clock, None
        rank.groups, rank.asked_at = {}, None

    def _learn(self, phase: str, step: int, duration_us: int) -> None:
        passes = self._pace.setdefault(phase, deque(maxlen=PACE_STEPS))
        if passes and passes[-1][0] == step:
            passes[-1] = (step, max(passes[-1][1], duration_us))
        else:
            passes.append((step, duration_us))

    def _silent(self, look: Callable[[int], Sighting | None]) -> list[Silent | Stalled]:
        found: list[Silent | Stalled] = []
        for number, rank in self._ranks.items():
            if rank.silent_us(self._clock) <= self.patience.rank_silence_us:
                continue
            seen = look(number)
            if seen is None or seen.unread or seen.status in ("zombie", "dead"):
                continue
            # Opening a device can hold the interpreter for many seconds; that comes before the first step.
            if seen.status in ("stopped", "tracing-stop") or rank.stepped:
                found.append(Silent(generation=self.generation, standing=self._standing(number, rank, seen)))
        return found

    def _standstill(self, look: Callable[[int], Sighting | None], was_away: bool) -> list[Silent | Stalled]:
        patience_us, stalled_us = self._longest_patience_us(), self._stalled_us()
        starting = any(rank.phase in _START for rank in self._ranks.values())
        if starting or stalled_us <= patience_us:
            goes_on_after_all, self._stalled = self._stalled, False
            return [self._report((), 0, 0)] if goes_on_after_all else []
        silent = [number for number, rank in self._ranks.items() if rank.silent_us(self._clock) > STALE_US]
        seen = {number: look(number) for number in (self._ranks if was_away else silent)}
        if any(sighting is not None and sighting.unread for sighting in seen.values()):
            return []  # they speak, but nobody in this agent has read it yet: they may have gone on
        self._stalled = True
        standings = tuple(self._standing(number, rank, seen.get(number)) for number, rank in self._ranks.items())
        return [self._report(standings, stalled_us, patience_us)]

    def _stalled_us(self) -> int:
        return self._clock - max(rank.progress_at for rank in self._ranks.values())

    def _longest_patience_us(self) -> int:
        return max(map(self._patience_us, self._ranks.values()))

    def _patience_us(self, rank: _Rank) -> int:
        """How long this rank may stand where it does, should others wait for it."""
        p = self.patience
        if rank.phase == "checkpoint":
            return max(p.stall_floor_us, p.save_us)
        kinds = ("compute", "save") if rank.phase == "compute" else (rank.phase,)
        slowest_us = max((us for kind in kinds for _, us in self._pace.get(kind, ())), default=0)
        if rank.phase == "compute" and not rank.stepped:
            slowest_us = max(slowest_us, self._first_before_us)
            paced = self._first_before_us > 0
        else:
            paced = rank.phase == "compute" or (rank.phase == "validate" and slowest_us > 0)
        expected_us = max(PACE_FACTOR * slowest_us, 0 if paced else p.start_us)
        return max(p.stall_floor_us, min(expected_us, round(WAIT_SHARE * p.collective_us)))

    def _report(self, ranks: tuple[Standing, ...], stalled_us: int, patience_us: int) -> Stalled:
        slowest_us = max((us for passes in self._pace.values() for _, us in passes), default=0)
        p = self.patience
        saving_us = max((p.save_us for rank in self._ranks.values() if rank.phase == "checkpoint"), default=0)
        return Stalled(
            generation=self.generation,
            ranks=ranks,
            stalled_us=stalled_us,
            patience_us=patience_us,
            slowest_us=slowest_us,
            hopeless=stalled_us > max(p.stall_floor_us, p.start_us, saving_us, PACE_FACTOR * slowest_us),
        )

    def _standing(self, number: int, rank: _Rank, seen: Sighting | None) -> Standing:
        return Standing(
            rank=number,
            step=rank.step,
            phase=rank.phase,
            where=rank.where,
            waited_us=rank.waited_us(self._clock),
            silent_us=rank.silent_us(self._clock),
            status="" if seen is None else seen.status,
            exchanges=rank.exchanges,
            groups=rank.groups,
            recorded_us=rank.recorded_us(self._clock) if self.patience.waits_unseen else 0,
        )


class FirstSteps:
    """How long the first step of a generation takes on one node, over its generations.

    What was learned in one holds for the next: a worker that is new takes as long as all did at first. One that got to
    no step leaves nothing known, so that whoever was ended too soon has all the time that there is when it comes again.
    """

    def __init__(self) -> None:
        self._program: object = None
        self._longest_us = 0

    def known_us(self, program: object) -> int:
        """What is known when a generation begins; 0: nothing, or it trains another program than those before."""
        if program != self._program:
            self._program, self._longest_us = program, 0
        return self._longest_us

    def learn(self, first_us: int) -> None:
        """A generation has ended; `first_us` as its watch has seen it."""
        self._longest_us = max(self._longest_us, first_us) if first_us else 0


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
    return standing.step, _PHASES.index(standing.phase), standing.rank


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
