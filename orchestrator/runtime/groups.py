"""The fold of a fan-in: reports of many nodes in, as few as say the same out. Pure.

Nodes train in step, so at any time most of them have the same to tell: this step is done, all ranks are ready, the
workers are gone. Such reports become one, with the slowest node's durations and the names of all who told it; what only
one node can tell passes as it is. For each node the order in which it told things stays.

Each report carries its number in its node's outbox. By that number the controller takes each once, whichever way it
comes, and the agent learns which it may forget.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.core.events import Event, NodesHalted
from orchestrator.runtime.reports import (
    FOLDED,
    HaltedAlike,
    NodeFinished,
    NodeReady,
    NodeStep,
    OwnTimes,
    Report,
    slower,
)
from trainer.contract import decode, encode


@dataclass
class Told:
    """A report, and who has told it."""

    tellers: dict[str, int]
    """Node to the report's number in its outbox."""
    report: Report


class GroupFold:
    """What nodes have told and the controller has not been sent, in order for each node."""

    def __init__(self) -> None:
        self._told: list[Told] = []
        self._first = 0
        """Place of the first of them since the beginning."""
        self._open: dict[Hashable, int] = {}
        """Place of the newest that says a thing which others may say, too."""
        self._newest: dict[str, int] = {}
        """Place of each node's newest."""

    def __len__(self) -> int:
        return len(self._told)

    def __iter__(self) -> Iterator[Told]:
        return iter(self._told)

    def add(self, node: str, number: int, report: Report) -> None:
        thing = _thing(report)
        place = self._open.get(thing, -1) if thing is not None else -1
        # Joining what stands before something that this node has told already would turn its order around.
        if place >= self._first and self._newest.get(node, -1) < place:
            same = self._told[place - self._first]
            same.tellers[node] = number
            same.report = _folded(same.report, report)
        else:
            place = self._first + len(self._told)
            self._told.append(Told({node: number}, report))
            if thing is not None:
                self._open[thing] = place
        self._newest[node] = place

    def take(self, limit: int) -> list[Told]:
        """The first `limit` of them, which are the receiver's from now on."""
        taken, self._told = self._told[:limit], self._told[limit:]
        self._first += len(taken)
        if not self._told:
            self._open.clear()
            self._newest.clear()
        return taken


def _thing(report: Report) -> Hashable:
    """Equal for reports that can be told as one; None for what only one node can tell."""
    match report:
        case NodeStep():
            return "step", report.generation, report.step
        case OwnTimes():
            return "own", report.generation, report.step
        case NodeReady():
            alike = (*sorted(report.versions.items()), *sorted(report.processes.items()))
            return "ready", report.generation, report.step, alike
        case NodeFinished() | HaltedAlike():
            return report
    return None


def _folded(one: Report, other: Report) -> Report:
    if isinstance(one, NodeStep) and isinstance(other, NodeStep):
        return slower(one, other)
    if isinstance(one, OwnTimes) and isinstance(other, OwnTimes):
        return replace(one, own_us=one.own_us | other.own_us, wall_us=max(one.wall_us, other.wall_us))
    if isinstance(one, NodeReady) and isinstance(other, NodeReady):
        return replace(
            one,
            rendezvous_us=max(one.rendezvous_us, other.rendezvous_us),
            build_us=max(one.build_us, other.build_us),
            restore_us=max(one.restore_us, other.restore_us),
        )
    assert one == other, (one, other)
    return one


def to_json(told: Told) -> list[Any]:
    return [told.tellers, encode(told.report)]


def from_json(document: list[Any]) -> Told:
    """What `to_json` was given.

    Raises:
        ValueError: it is no report, or told by more than can tell such a one.
    """
    tellers, report = document
    told = Told({str(node): int(number) for node, number in tellers.items()}, report_from_json(report))
    if not told.tellers or (len(told.tellers) > 1 and not isinstance(told.report, FOLDED)):
        raise ValueError(f"{type(told.report).__name__} told by {len(told.tellers)} nodes")
    return told


def report_from_json(document: dict[str, Any]) -> Report:
    """The report of a JSON object made by `encode`. Raises ValueError when it is none.

    Steps are what nodes say most, and plain: without the general reading of a type it takes a tenth of the time.
    """
    if document.get("type") != "NodeStep":
        report: Report = decode(document, Report)
        return report
    try:
        return NodeStep(**{name: value for name, value in document.items() if name != "type"})
    except TypeError as e:
        raise ValueError(f"NodeStep: {e}") from e


def fitting(documents: Iterable[Any], limit_bytes: int) -> list[Any]:
    """The first of these JSON values: as many as together take no more bytes, but at least one."""
    fit: list[Any] = []
    n_bytes = 0
    for document in documents:
        n_bytes += len(json.dumps(document, separators=(",", ":")))
        if fit and n_bytes > limit_bytes:
            break
        fit.append(document)
    return fit


def halts_joined(events: Iterable[Event]) -> list[Event]:
    """The same events, but answers to a halt that stand next to each other and are alike in one.

    A node that answers twice, as to a controller that came back, is not joined with its own answer.
    """
    joined: list[Event] = []
    names: set[str] = set()
    for event in events:
        before = joined[-1] if joined else None
        if not isinstance(event, NodesHalted):
            joined.append(event)
        elif isinstance(before, NodesHalted) and _alike(before, event) and names.isdisjoint(event.nodes):
            joined[-1] = replace(before, nodes=before.nodes + event.nodes)
            names.update(event.nodes)
        else:
            joined.append(event)
            names = set(event.nodes)
    return joined


def _alike(one: NodesHalted, other: NodesHalted) -> bool:
    return replace(one, nodes=other.nodes) == other
