"""Hangs, as a node sees them of its own ranks: who lives, but shows no sign of life or makes no progress.

Pure: durations and messages in, findings out. There are two:

- *silent*: no message of a rank for `rank_silence_us`. Its process is stopped; or its loop never lets go of the
  interpreter, for `stall_floor_us` at least.
- *stalled*: no rank of the node has made progress (a step, a phase) for longer than the run's own pace explains.
  Who keeps the others waiting cannot be told here: the node says where its ranks stand, and the mesh's watch
  (`runtime/blame.py`) names them.

Where torch has a flight recorder, it tells which collectives each rank has begun in which group. It is read shortly
before a stall is told.

Each agent measures durations on its own clock, and only while it attends to it: the time in which the agent itself
stood still counts for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

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

# What a rank does between two steps, in order: who stands further to the left is behind.
PHASES = ("rendezvous", "build", "restore", "checkpoint", "validate", "compute", "finished")
# The generation's start has its own deadline, and the controller's clock.
_START = PHASES[:3]


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
            # Opening a device can hold the interpreter for many seconds; that comes before the first step. Later a call
            # that holds it may last as long as any other between two steps.
            holds_on = rank.stepped and rank.silent_us(self._clock) > self.patience.stall_floor_us
            if seen.status in ("stopped", "tracing-stop") or holds_on:
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
