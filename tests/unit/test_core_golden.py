"""Scripted conversations with the supervisor, which a person can read: tests/golden/*.trace.

A trace is made of blocks: events, one a line, then ``----``, then what the supervisor answered and where it stands.
Each event comes one second after the one before, or after ``+Ns``. The notation is the table of `_EVENTS` below;
``0:1@39,1@40`` reads "slot 0 has the snapshots of generation 1 at steps 39 and 40".

After a change that is meant, write the answers anew with SHEPHERD_REWRITE_GOLDEN=1, and read the difference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import core_breakages
import pytest

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core.supervisor import Supervisor
from storage.manifest import Certificate
from trainer.contract import Degrees

GOLDEN = Path(__file__).parents[1] / "golden"
TRACES = sorted(GOLDEN.glob("*.trace"))
SECOND = 1_000_000


def _run(at: int, words: list[str]) -> ev.RunDeclared:
    options = dict(word.split("=") for word in words)
    pp, dp_replicate, dp_shard, tp = (int(n) for n in options.pop("mesh").split("x"))
    per_node = int(options.pop("per-node", "1"))
    nodes = pp * dp_replicate * dp_shard * tp // per_node
    event = ev.RunDeclared(
        at=at,
        run="llama",
        layout=ev.Layout(
            pp=pp,
            dp_replicate=dp_replicate,
            dp_shard=dp_shard,
            tp=tp,
            slots_per_node=per_node,
            nodes=nodes,
            spares=int(options.pop("spares", "0")),
            shrinks_to=tuple(int(n) for n in options.pop("shrinks", "").split(",") if n),
            fallbacks=tuple(
                Degrees(**dict(zip(("pp", "dp_replicate", "dp_shard", "tp"), map(int, mesh.split("x")), strict=True)))
                for mesh in filter(None, options.pop("fallbacks", "").split(","))
            ),
        ),
        limits=ev.Limits(
            halt_deadline_us=10 * SECOND,
            start_deadline_us=300 * SECOND,
            wait_deadline_us=600 * SECOND,
            commit_deadline_us=120 * SECOND,
            same_error_tries=2,
            recoveries_without_progress=int(options.pop("recoveries", "4")),
            strikes=int(options.pop("strikes", "3")),
            keep_checkpoints=int(options.pop("keep", "3")),
            strike_expiry_us=int(options.pop("expiry", "604800")) * SECOND,
            probation_us=int(options.pop("probation", "86400")) * SECOND,
            quarantined_at_most=int(options.pop("cap", "3")),
            grow_settle_us=60 * SECOND,
            keep_every_steps=int(options.pop("every", "0")),
            scrub_us=int(options.pop("scrub", "0")) * SECOND,
            verify_bytes_per_s=100,
        ),
        total_steps=ev.OPEN_END if options["steps"] == "open" else int(options["steps"]),
        capabilities=tuple(filter(None, options.pop("can", "ram,peer").split(","))),
    )
    assert set(options) == {"steps"}, options
    return event


def _snapshots(words: list[str]) -> dict[int, tuple[ev.Snapshot, ...]]:
    held = {}
    for word in words:
        slot, _, names = word.partition(":")
        pairs = [name.split("@") for name in names.split(",")]
        held[int(slot)] = tuple(ev.Snapshot(generation=int(g), step=int(step)) for g, step in pairs)
    return held


def _join(at: int, w: list[str]) -> ev.NodeJoined:
    name, *rest = w
    domain = f"{rest.pop(0)} {rest.pop(0)}" if rest[:1] == ["rack"] else ""
    return ev.NodeJoined(at=at, node=name, domain=domain, snapshots=_snapshots(rest))


def _halted(at: int, w: list[str], parked: bool) -> ev.NodeHalted:
    return ev.NodeHalted(at=at, node=w[1], generation=_g(w[0]), snapshots=_snapshots(w[2:]), parked=parked)


def _disagreed(at: int, w: list[str]) -> ev.AuditDisagreed:
    step, auditor, accused = int(w[2]), w[3], w[4]
    return ev.AuditDisagreed(
        at=at, generation=_g(w[0]), step=step, auditor=auditor, accused=accused, detail=" ".join(w[5:])
    )


def _failed(at: int, w: list[str]) -> ev.WorkerFailed:
    node, slot = w[1].split(":")
    kind, error = w[4], " ".join(w[5:])
    return ev.WorkerFailed(
        at=at, node=node, generation=_g(w[0]), slot=int(slot), step=int(w[3]), kind=kind, error=error
    )


def _exited(at: int, w: list[str]) -> ev.WorkerExited:
    node, slot = w[1].split(":")
    code, signal = (None, int(w[3])) if w[2] == "signal" else (int(w[3]), None)
    return ev.WorkerExited(at=at, node=node, generation=_g(w[0]), slot=int(slot), exit_code=code, signal=signal)


def _hung(at: int, w: list[str]) -> ev.WorkerHung:
    node, _, slot = w[1].removeprefix("-").partition(":")
    where = int(slot) if slot else None
    return ev.WorkerHung(at=at, node=node, generation=_g(w[0]), slot=where, step=int(w[3]), detail=" ".join(w[4:]))


def _update(at: int, w: list[str]) -> ev.UpdateRequested:
    options = dict(word.split("=") for word in w if "=" in word)
    steps, code, number = int(options.pop("steps")), options.pop("code", ""), int(options.pop("number", "0"))
    return ev.UpdateRequested(
        at=at,
        by="the operator",
        total_steps=steps,
        code=code,
        restarts="in-place" not in w,
        chooses_interval="keeps-interval" not in w,
        limits=_run(at, ["mesh=1x1x1x1", "steps=1"]).limits,
        changes={name: value for name, value in options.items() if not name.startswith("was:")},
        undo={name.removeprefix("was:"): value for name, value in options.items() if name.startswith("was:")},
        number=number,
    )


def _fault(at: int, w: list[str]) -> ev.FaultRequested:
    options = dict(word.split("=") for word in w[1:])
    node, slot = options.pop("node", ""), options.pop("slot", None)
    return ev.FaultRequested(
        at=at,
        fault=w[0],
        node=node,
        slot=None if slot is None else int(slot),
        parameters=options,
        by="the operator",
    )


def _steps(at: int, w: list[str]) -> ev.StepsDone:
    first, last = (int(n) for n in w[1].split("-"))
    return ev.StepsDone(
        at=at,
        generation=_g(w[0]),
        first=first,
        last=last,
        data_wait_us=0,
        checkpoint_us=0,
        validation_us=0,
        tokens=0,
        loss_millionths=(),
    )


def _read(at: int, w: list[str]) -> ev.CheckpointVerified:
    word, words = w[4], " ".join(w[5:])
    return ev.CheckpointVerified(
        at=at,
        number=int(w[0]),
        step=int(w[1]),
        generation=_g(w[2]),
        node=w[3],
        bytes=100,
        read_us=SECOND,
        problems=(words,) if word == "damaged" else (),
        unread=words if word == "not" else "",
    )


def _certified(at: int, w: list[str]) -> ev.CheckpointCertified:
    step, generation = int(w[0]), _g(w[1])
    certificate = Certificate(
        step=step,
        generation=generation,
        checks=("third",),
        audits_passed=300,
        fault_rate_per_billion=10_000_000,
        confidence_per_million=950_000,
        epoch=1,
    )
    return ev.CheckpointCertified(at=at, step=step, generation=generation, certificate=certificate)


def _g(word: str) -> int:
    return int(word.removeprefix("g"))


_EVENTS: dict[str, Callable[[int, list[str]], ev.Event]] = {
    # run mesh=PPxREPLICATExSHARDxTP [per-node=N] [spares=N] [shrinks=N,...] steps=N [can=ram,peer] [recoveries=N]
    #     [keep=N] [strikes=N] [expiry=SECONDS] [probation=SECONDS] [cap=N] [every=STEPS] [scrub=SECONDS]
    "run": _run,
    # epoch N
    "epoch": lambda at, w: ev.EpochBegan(at=at, epoch=int(w[0]), version="test"),
    # found STEP ...
    "found": lambda at, w: ev.CheckpointsFound(at=at, steps=tuple(int(step) for step in w)),
    # join NODE [rack NAME] [SLOT:SNAPSHOTS ...]
    "join": _join,
    # lost NODE CAUSE
    "lost": lambda at, w: ev.NodeLost(at=at, node=w[0], cause=" ".join(w[1:])),
    # leaving NODE BY
    "leaving": lambda at, w: ev.NodeLeaving(at=at, node=w[0], by=" ".join(w[1:])),
    # slow gN NODE DETAIL
    "slow": lambda at, w: ev.NodeSlow(at=at, node=w[1], generation=_g(w[0]), detail=" ".join(w[2:])),
    # probed NUMBER NODE passed|failed DETAIL
    "probed": lambda at, w: ev.NodeProbed(
        at=at, number=int(w[0]), node=w[1], passed=w[2] == "passed", detail=" ".join(w[3:])
    ),
    # disagreed gN step STEP AUDITOR ACCUSED DETAIL
    "disagreed": _disagreed,
    # settled NUMBER NODE|- DETAIL
    "settled": lambda at, w: ev.AuditSettled(
        at=at, number=int(w[0]), wrong=w[1].removeprefix("-"), detail=" ".join(w[2:])
    ),
    # ready gN step STEP
    "ready": lambda at, w: ev.GenerationReady(
        at=at, generation=_g(w[0]), step=int(w[2]), rendezvous_us=0, build_us=0, restore_us=0
    ),
    # steps gN FIRST-LAST
    "steps": _steps,
    # failed gN NODE:SLOT step STEP KIND ERROR
    "failed": _failed,
    # exited gN NODE:SLOT signal|code N
    "exited": _exited,
    # hung gN NODE:SLOT|- step STEP DETAIL
    "hung": _hung,
    # refused gN NODE ERROR
    "refused": lambda at, w: ev.GenerationFailed(at=at, generation=_g(w[0]), node=w[1], error=" ".join(w[2:])),
    # nowhere-whole gN NODE ERROR
    "nowhere-whole": lambda at, w: ev.GenerationFailed(
        at=at, generation=_g(w[0]), node=w[1], error=" ".join(w[2:]), kind="state"
    ),
    # halted-alike gN NODE,... SNAPSHOTS
    "halted-alike": lambda at, w: ev.NodesHalted(
        at=at, generation=_g(w[0]), nodes=tuple(w[1].split(",")), snapshots=_snapshots([f"0:{w[2]}"])[0]
    ),
    # halted|parked gN NODE [SLOT:SNAPSHOTS ...]
    "halted": lambda at, w: _halted(at, w, parked=False),
    "parked": lambda at, w: _halted(at, w, parked=True),
    # written gN STEP [BYTES]
    "written": lambda at, w: ev.CheckpointWritten(
        at=at, generation=_g(w[0]), step=int(w[1]), bytes=int(w[2]) if w[2:] else 0, write_us=0
    ),
    # committed gN STEP
    "committed": lambda at, w: ev.CheckpointCommitted(at=at, step=int(w[1]), epoch=1, generation=_g(w[0])),
    # unsaved STEP ERROR
    "unsaved": lambda at, w: ev.CheckpointFailed(at=at, step=int(w[0]), error=" ".join(w[1:])),
    # read NUMBER STEP gN NODE whole|damaged|not [WHY]
    "read": _read,
    # certified STEP gN
    "certified": _certified,
    # pinned STEP ...
    "pinned": lambda at, w: ev.CheckpointsPinned(at=at, steps=tuple(int(step) for step in w)),
    # update steps=N [number=N] [code=NAME] [in-place] [keeps-interval] [FIELD=VALUE was:FIELD=VALUE] ...
    "update": _update,
    # interval STEPS WHY
    "interval": lambda at, w: ev.IntervalChosen(
        at=at,
        every_steps=int(w[0]),
        step_us=0,
        stall_us=0,
        write_us=0,
        restores=0,
        exposed_us=0,
        why=" ".join(w[1:]),
    ),
    # finished gN STEP completed|stopped
    "finished": lambda at, w: ev.GenerationFinished(at=at, generation=_g(w[0]), step=int(w[1]), reason=w[2]),
    # stop gracefully|now
    "stop": lambda at, w: ev.StopRequested(at=at, by="the operator", graceful=w[0] == "gracefully"),
    # damaged gG NODE slot N step N DETAIL
    "damaged": lambda at, w: ev.CopyDamaged(
        at=at, node=w[1], generation=_g(w[0]), slot=int(w[3]), step=int(w[5]), detail=" ".join(w[6:])
    ),
    # fault NAME [node=NODE] [slot=SLOT] [PARAMETER=VALUE ...]
    "fault": _fault,
    # injected NUMBER DETAIL
    "injected": lambda at, w: ev.FaultInjected(at=at, number=int(w[0]), detail=" ".join(w[1:])),
    # timer NAME
    "timer": lambda at, w: ev.TimerFired(at=at, timer=w[0]),
}


def _told(action: ac.Action, now: int) -> str:
    match action:
        case ac.OpenGeneration():
            state = {"init": "from the beginning", "durable": f"checkpoint {action.step}"}.get(
                action.source, f"shared memory, step {action.step} of g{action.snapshot_generation}"
            )
            if action.snapshot_fallback != action.fallback:
                state += f", of {action.snapshot_fallback or 'the declared mesh'}"
            elif action.snapshot_dp_replicate != action.dp_replicate:
                state += f", of a mesh with {action.snapshot_dp_replicate} x dp_replicate"
            copies = "".join(
                f"\n    copy {t.from_node}:{t.from_slot} to {t.to_node}:{t.slot}" for t in action.transfers
            )
            kept = (f"{node} by {action.nodes[by]}" for node, by in zip(action.nodes, action.buddies, strict=False))
            copies += f"\n    copies kept of {', '.join(kept)}" if action.buddies else ""
            code = f", code {action.code}" * bool(action.code)
            return f"open g{action.generation} on {' '.join(action.nodes)}: {state}{code}{copies}\n    {action.reason}"
        case ac.HaltGeneration():
            verb = "park" if action.park else "halt"
            return f"{verb} g{action.generation} on {' '.join(action.nodes)}\n    {action.reason}"
        case ac.AskStop():
            return f"ask g{action.generation} to stop"
        case ac.SaveEvery():
            return f"save each {action.steps} steps in g{action.generation}"
        case ac.UpdateJob():
            return f"update {action.number}: " + " ".join(f"{name}={value}" for name, value in action.changes.items())
        case ac.CommitCheckpoint():
            damaged = ", replacing the damaged one" if action.replaces_damaged else ""
            return f"commit step {action.step} of g{action.generation} in epoch {action.epoch}{damaged}"
        case ac.DeleteCheckpoint():
            return f"delete checkpoint {action.step}"
        case ac.VerifyCheckpoint():
            return f"verify {action.number}: {action.node} reads checkpoint {action.step} of g{action.generation}"
        case ac.PublishTrust():
            words = f"publish that checkpoint {action.step} of g{action.generation} is {action.trust}"
            return f"{words}, says {action.by}\n    {action.detail}"
        case ac.InjectFault():
            slot = "" if action.slot is None else f":{action.slot}"
            words = "".join(f" {name}={value}" for name, value in action.parameters.items())
            return f"inject {action.number}: {action.fault} g{action.generation} {action.node or '-'}{slot}{words}"
        case ac.ReleaseNode():
            return f"release {action.node}{' for good' * action.for_good}\n    {action.reason}"
        case ac.ProbeNode():
            return f"probe {action.number}: {action.node}"
        case ac.AskThird():
            audit = f"step {action.step} of g{action.generation} by {action.auditor} and {action.accused}"
            return f"ask {action.judge} about audit {action.number}: {audit}"
        case ac.SetTimer():
            return f"timer {action.timer} in {(action.at - now) // SECOND} s"
        case ac.EndRun():
            return f"end with {action.exit_code}\n    {action.reason}"


def _standing(supervisor: Supervisor) -> str:
    s = supervisor.state
    by_state: dict[str, list[str]] = {}
    for name, node in s.nodes.items():
        by_state.setdefault(node.state, []).append(name)
    for name, node in s.nodes.items():
        if node.state in ("spare", "active") and s.standing(name) != "good":
            by_state.setdefault(s.standing(name), []).append(name)
    nodes = "; ".join(f"{state} {' '.join(names)}" for state, names in by_state.items())
    failing = f"; saving fails: {s.save_error}" if s.save_error else ""
    every = f"; a save each {s.interval.every_steps} steps" if s.interval is not None else ""
    rungs = f" ({', then '.join(s.incident.rungs)})" if s.incident is not None and s.incident.rungs else ""
    trusts = ", ".join(f"{step} {c.trust}{' in doubt' * bool(c.doubt)}" for step, c in s.checkpoints.items())
    known = f"\n  checkpoints: {trusts}" if "verify" in s.capabilities and trusts else ""
    return f"= {s.job}{rungs}, step {s.step}; {nodes or 'no nodes'}{failing}{every}{known}"


def play(text: str) -> str:
    """The trace with the answers as they are now."""
    supervisor, at, blocks = Supervisor(), 0, []
    for block in re.split(r"\n\n+", text.strip()):
        asked = block.split("\n----")[0]
        answers = []
        for line in asked.splitlines():
            if line.startswith("#"):
                continue
            words = line.split()
            pause = re.fullmatch(r"\+(\d+)s", words[0])
            at += SECOND * (int(pause.group(1)) if pause else 1)
            name, *rest = words[1:] if pause else words
            answers += [_told(action, at) for action in supervisor.handle(_EVENTS[name](at, rest))]
        if all(line.startswith("#") for line in asked.splitlines()):
            blocks.append(asked)
        else:
            blocks.append("\n".join([asked, "----", *answers, _standing(supervisor)]))
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.stem)
def test_trace(trace: Path) -> None:
    text = trace.read_text()
    played = play(text)
    if os.environ.get("SHEPHERD_REWRITE_GOLDEN") == "1":
        trace.write_text(played)
    else:
        assert played.splitlines() == text.splitlines()


def test_there_are_traces() -> None:
    assert len(TRACES) >= 12


def test_a_changed_answer_is_seen() -> None:
    text = TRACES[0].read_text()
    changed: Any = text.replace("open g1", "open g2", 1)
    assert changed != text and play(changed) == text


def test_an_update_that_was_saved_from_and_is_taken_back_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (GOLDEN / "update_taken_back.trace").read_text()
    core_breakages.an_update_is_taken_back_that_was_saved_from(monkeypatch)
    assert play(text) != text


@pytest.mark.parametrize("moment", ["_on_interval_chosen", "_on_generation_ready", "_on_epoch_began"])
def test_an_interval_that_is_not_told_at_one_of_its_moments_is_seen(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (GOLDEN / "interval_retuned.trace").read_text()
    core_breakages.orders_are_forgotten(monkeypatch, moment, ac.SaveEvery)
    assert play(text) != text


def test_an_interval_that_outlives_the_document_it_was_chosen_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (GOLDEN / "interval_retuned.trace").read_text()
    core_breakages.the_interval_outlives_a_resume(monkeypatch)
    assert play(text) != text


def test_what_is_being_restored_from_must_not_be_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (GOLDEN / "retention_while_starting.trace").read_text()
    core_breakages.what_is_being_restored_from_is_deleted(monkeypatch)
    assert play(text) != text


def test_a_conviction_that_asks_for_no_certificate_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (GOLDEN / "rewind.trace").read_text()
    core_breakages.a_conviction_asks_for_no_certificate(monkeypatch)
    assert play(text) != text


def test_a_resume_that_forgets_what_memory_holds_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (GOLDEN / "head_lost_and_resumed.trace").read_text()
    core_breakages.a_resume_forgets_what_memory_holds(monkeypatch)
    assert play(text) != text
