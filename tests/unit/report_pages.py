"""Pages of `shepherd report` for tests: journals to make them from, and what stands in them, read as a browser does."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import test_core_golden as golden
from core_body import Body
from core_world import Tape

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core.codec import action_to_json
from orchestrator.core.supervisor import Supervisor
from orchestrator.observe.report import render
from orchestrator.runtime.journal import Journal, Record, claim_epoch

SECOND = 1_000_000
Log = Sequence[tuple[ev.Event, list[ac.Action]]]

_VOID = {"meta", "img", "br", "link", "input", "hr", "base", "source"}


class Page(HTMLParser):
    """The elements of a page, each with its attributes and its own visible text, and the JSON that it carries."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.raw = text
        self.elements: list[tuple[str, dict[str, str | None], list[str], tuple[str, ...]]] = []
        """Tag, attributes, text pieces, and the ids of the elements around it."""
        self._open: list[int] = []
        self.feed(text)
        self.close()
        assert not self._open, [self.elements[i][0] for i in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        around = tuple(str(self.elements[i][1]["id"]) for i in self._open if "id" in self.elements[i][1])
        self.elements.append((tag, dict(attrs), [], around))
        if tag not in _VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open[-1]][0] == tag, (tag, self.getpos())
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for i in self._open:
            self.elements[i][2].append(data)

    def find(self, tag: str, under: str = "", **attributes: str) -> list[tuple[dict[str, str | None], str]]:
        """Attributes and text of all such elements, in those whose id is `under` if given."""
        return [
            (attrs, " ".join("".join(pieces).split()))
            for name, attrs, pieces, around in self.elements
            if name == tag
            and (not under or under in around)
            and all(attrs.get(key) == value for key, value in attributes.items())
        ]

    def text(self, id_: str) -> str:
        return next(" ".join("".join(p).split()) for _, a, p, _ in self.elements if a.get("id") == id_)

    def json(self, id_: str) -> Any:
        ((_, text),) = self.find("script", id=id_)
        return json.loads(text)


def records_of(events: Iterable[ev.Event]) -> list[Record]:
    """The journal of a supervisor that is told these events."""
    supervisor = Supervisor()
    return as_records([(event, supervisor.handle(event)) for event in events])


def hostile(seed: int, length: int = 500) -> list[Record]:
    """The journal of one random history."""
    body = Body(Tape(random.Random(seed).randbytes(length)))
    body.run()
    return as_records(body.watch.log)


def as_records(log: Log) -> list[Record]:
    return [
        Record(
            seq=i,
            epoch=1,
            event=event,
            actions=tuple(json.loads(json.dumps(action_to_json(action))) for action in actions),
        )
        for i, (event, actions) in enumerate(log, 1)
    ]


def trace(name: str) -> list[Record]:
    """The journal of one of tests/golden."""
    events, at = [], 0
    for block in re.split(r"\n\n+", (Path(golden.GOLDEN) / f"{name}.trace").read_text().strip()):
        for line in block.split("\n----")[0].splitlines():
            if line.startswith("#"):
                continue
            words = line.split()
            pause = re.fullmatch(r"\+(\d+)s", words[0])
            at += SECOND * (int(pause.group(1)) if pause else 1)
            name, *rest = words[1:] if pause else words
            events.append(golden._EVENTS[name](at, rest))
    return records_of(events)


def write_journal(url: str, tail: Path, records: Sequence[Record]) -> None:
    """Put the records' events under `url`, as a controller would."""
    supervisor = Supervisor()
    journal = Journal(url, tail, claim_epoch(url, "test").epoch)
    for i, record in enumerate(records):
        journal.append(record.event, supervisor.handle(record.event))
        if i % 1000 == 0:
            journal.publish()
    journal.close()


def page_of(records: Sequence[Record]) -> Page:
    return Page(render(list(records)))


def long_run(n: int) -> list[ev.Event]:
    """A run of `n` reports of steps, with a worker's death every 500 and a checkpoint every 200."""
    layout = ev.Layout(pp=1, dp_replicate=2, dp_shard=1, tp=1, slots_per_node=1, nodes=2, spares=1)
    limits = ev.Limits(
        halt_deadline_us=10 * SECOND,
        start_deadline_us=300 * SECOND,
        wait_deadline_us=600 * SECOND,
        commit_deadline_us=120 * SECOND,
        same_error_tries=2,
        recoveries_without_progress=6,
        strikes=1000,
        keep_checkpoints=3,
    )
    at = 0
    declared = ev.RunDeclared(
        at=at, run="long", layout=layout, limits=limits, total_steps=10 * n, capabilities=("ram", "peer")
    )
    events: list[ev.Event] = [declared, ev.EpochBegan(at=at, epoch=1, version="test")]
    events += [ev.CheckpointsFound(at=at, steps=())]
    events += [ev.NodeJoined(at=at, node=name, domain="", snapshots={}) for name in ("a", "b", "c")]
    generation = 1
    events.append(_ready(at, generation, 0))
    for i in range(n):
        at += SECOND
        last = 10 * (i + 1)
        events.append(
            ev.StepsDone(
                at=at,
                generation=generation,
                first=last - 9,
                last=last,
                data_wait_us=1000,
                checkpoint_us=2000,
                validation_us=0,
                tokens=10_240,
                loss_millionths=tuple(8_000_000 - step for step in range(last - 9, last + 1)),
            )
        )
        if i % 200 == 199:
            events.append(
                ev.CheckpointWritten(at=at, generation=generation, step=last, bytes=2**20, write_us=1_500_000)
            )
            events.append(ev.CheckpointCommitted(at=at, step=last, epoch=1, generation=generation))
        if i % 500 == 499 and i + 1 < n:
            at += SECOND
            events.append(ev.WorkerExited(at=at, node="a", generation=generation, slot=0, exit_code=None, signal=9))
            for slot, node in enumerate(("a", "b")):
                held = {slot: (ev.Snapshot(generation=generation, step=last),)}
                events.append(ev.NodeHalted(at=at, node=node, generation=generation, snapshots=held))
            generation += 1
            events.append(_ready(at + SECOND // 2, generation, last))
    return events


def _ready(at: int, generation: int, step: int) -> ev.GenerationReady:
    return ev.GenerationReady(
        at=at,
        generation=generation,
        step=step,
        rendezvous_us=100_000,
        build_us=50_000,
        restore_us=20_000,
        processes={"forked": 2} if generation == 1 else {"parked": 1, "warm": 1},
    )
