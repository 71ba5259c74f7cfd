"""`shepherd doctor`: looks at every node that a run could take, before it does, and says what to do.

An actor on each node answers questions (doctor_node.py); every question has a deadline, and no answer is a finding,
too. What the answers mean is judged apart (doctor_judge.py). The actors reserve nothing and are gone at the end.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import ray
from fsspec.core import split_protocol
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.markup import escape
from rich.table import Table

from orchestrator import preflight
from orchestrator.doctor_judge import Facts, Finding, Silent, judge
from orchestrator.doctor_node import TOOL_DEADLINE_S, NodeDoctor
from orchestrator.need import need_of
from orchestrator.observe.live import new_console
from orchestrator.runtime import driver, journal
from orchestrator.runtime.nodes import HEAD_RESOURCE, eligible, last_line
from orchestrator.spec import JobSpec
from storage.redact import redacted
from storage.urls import SINGLE_WRITER

T = TypeVar("T")

START_DEADLINE_S = 60.0
"""For an actor to come up on each node: Ray starts a process, which imports Ray in a second or two."""
ANSWER_DEADLINE_S = 30.0
"""For a look at a file system, a store or a peer: a store that needs more would stall the run, too."""
CLOCK_DEADLINE_S = 2.0
CLOCKS_DEADLINE_S = 60.0
"""For all clocks, which are asked one after the other."""
CLOCK_TRIES = 3
END_DEADLINE_S = 10.0
ALL_PAIRS_NODES = 16
"""Up to here every node dials every other; beyond, each its next three, or 2,000 nodes would make 4 million
connections."""
RING_PEERS = 3


def examine(spec: JobSpec) -> list[Finding]:
    """Everything that was found, in the order of `judge`. Needs a connected Ray.

    Raises:
        driver.RunError: Ray does not list its nodes.
    """
    return judge(spec, gather(spec))


def gather(spec: JobSpec) -> Facts:
    """Ask this machine and every node."""
    local = _within(ANSWER_DEADLINE_S, lambda: _look_here(spec))
    listed = _within(ANSWER_DEADLINE_S, lambda: _list_nodes(spec))
    if isinstance(listed, Silent):
        raise driver.RunError(f"Ray does not list its nodes: {listed.why}")
    asked, candidates, free, head, here = listed
    started, problems = local if not isinstance(local, Silent) else (False, (f"looking at run.url: {local.why}",))
    return Facts(
        here=here,
        head=head,
        candidates=candidates,
        free=free,
        answers=_ask_nodes(spec, asked, candidates, head),
        local=problems,
        started=started,
        active=_within(ANSWER_DEADLINE_S, lambda: _is_active(spec)) is True,
        token=token_problem(spec),
    )


def _look_here(spec: JobSpec) -> tuple[bool, tuple[str, ...]]:
    started = False
    with suppress(Exception):  # said by the check that follows
        started = journal.exists(spec.run.url)
    return started, tuple(redacted(line) for line in preflight.problems_here(spec, resume=started))


def _list_nodes(spec: JobSpec) -> tuple[dict[str, tuple[str, str]], tuple[str, ...], int, str, str]:
    """Ray's id and address by name of the nodes to ask; those that the run could take; how many of them are free; the
    head; this one."""
    fit = eligible(spec)
    ids = {node.id for node in fit}
    rows = [row for row in ray.nodes() if row["Alive"]]  # type: ignore[no-untyped-call]
    names = {row["NodeID"]: f"{row['NodeID'][:8]} ({row['NodeManagerHostname']})" for row in rows}
    addresses = {row["NodeID"]: str(row["NodeManagerAddress"]) for row in rows}
    head = next((row["NodeID"] for row in rows if HEAD_RESOURCE in row["Resources"]), "")
    here = ray.get_runtime_context().get_node_id()
    asked = {names[node]: (node, addresses[node]) for node in names if node in ids | {head, here}}
    candidates = tuple(names[node.id] for node in fit if node.id in names)
    return asked, candidates, sum(node.free for node in fit), names.get(head, ""), names.get(here, "this machine")


def _is_active(spec: JobSpec) -> bool:
    try:
        driver.find(spec.run.name)
    except driver.RunError:
        return False
    return True


def _ask_nodes(
    spec: JobSpec, asked: Mapping[str, tuple[str, str]], candidates: tuple[str, ...], head: str
) -> dict[str, dict[str, Any]]:
    """Check to node to answer. The actors are gone when this returns."""
    actors: dict[str, Any] = {}
    try:
        for name, (node, _) in asked.items():
            options = {
                "num_cpus": 0,
                "max_concurrency": 16,
                "max_restarts": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
            }
            actors[name] = ray.remote(NodeDoctor).options(**options).remote(spec.document())
        answers = {"start": _collect({name: actor.hello.remote() for name, actor in actors.items()}, START_DEADLINE_S)}
        awake = {name: actors[name] for name in _told(answers["start"])}
        workers = {name: actor for name, actor in awake.items() if name in candidates}
        answers["clock"] = _clocks(awake)
        answers |= _first_round(spec, awake, workers, head)
        answers |= _connections(workers, asked)
        return answers | _store(awake, head)
    finally:
        for actor in actors.values():
            ray.kill(actor, no_restart=True)


def _first_round(
    spec: JobSpec, awake: Mapping[str, Any], workers: Mapping[str, Any], head: str
) -> dict[str, dict[str, Any]]:
    """What each node can tell of itself; all questions are under way at once."""
    cluster, metrics = spec.cluster, spec.metrics
    refs = {
        "versions": {name: actor.versions.remote() for name, actor in awake.items()},
        "numeric": {name: actor.numeric.remote() for name, actor in workers.items()},
        "ram_dir": {name: actor.place.remote(cluster.ram_dir) for name, actor in workers.items()},
        "memory": {name: actor.memory.remote() for name, actor in workers.items()},
        "limits": {name: actor.limits.remote() for name, actor in workers.items()},
        "log_dir": {name: actor.place.remote(cluster.log_dir) for name, actor in awake.items()},
        "cache_dir": {name: actor.place.remote(spec.data.cache_dir) for name, actor in workers.items()},
        "metrics_port": {
            name: awake[name].bind.remote(metrics.bind, metrics.port) for name in (head,) if name in awake
        },
    }
    protocol, path = split_protocol(spec.run.url.removeprefix(SINGLE_WRITER))
    if protocol in (None, "file", "local"):
        refs["run_dir"] = {name: actor.place.remote(path) for name, actor in awake.items()}
    elif protocol not in ("s3", "s3a"):  # which takes parts from memory
        refs["temporary"] = {name: actor.temporary.remote() for name, actor in workers.items()}
    deadline = time.monotonic() + ANSWER_DEADLINE_S
    slow = refs.pop("numeric")
    answers = {check: _collect(asked, deadline - time.monotonic()) for check, asked in refs.items()}
    return answers | {"numeric": _collect(slow, TOOL_DEADLINE_S)}


def _connections(workers: Mapping[str, Any], asked: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Whether nodes reach each other's Ray addresses."""
    refs = {name: actor.listen.remote(asked[name][1]) for name, actor in workers.items()}
    listening = _collect(refs, ANSWER_DEADLINE_S)
    places = _told(listening)
    order = sorted(places)
    dialled = {}
    for index, name in enumerate(order):
        others = order[index + 1 :] + order[:index]
        peers = others if len(order) <= ALL_PAIRS_NODES else others[:RING_PEERS]
        dialled[name] = workers[name].dial.remote({peer: places[peer] for peer in peers})
    return {"listen": listening, "dial": _collect(dialled, ANSWER_DEADLINE_S + 5 * ALL_PAIRS_NODES)}


def _store(awake: Mapping[str, Any], head: str) -> dict[str, dict[str, Any]]:
    """Whether what one node writes under run.url is seen by all, and whether those create exclusively."""
    if not awake:
        return {}
    writer = head if head in awake else next(iter(awake))
    name, content = f".doctor-{secrets.token_hex(8)}", secrets.token_bytes(16)
    written = _collect({writer: awake[writer].write.remote(name, content)}, ANSWER_DEADLINE_S)
    if not _told(written):
        return {"probe": written}
    sees = _collect({node: actor.sees.remote(name, content) for node, actor in awake.items()}, ANSWER_DEADLINE_S)
    # Where it is not the same store, nothing is left behind by writing there, too.
    refs = {node: awake[node].probe.remote() for node, seen in _told(sees).items() if seen}
    probed = _collect(refs, ANSWER_DEADLINE_S)
    removed = _collect({writer: awake[writer].remove.remote(name)}, END_DEADLINE_S)
    return {"sees": sees, "probe": probed, "remove": removed}


def _clocks(awake: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds by which each node's clock is ahead of this machine's, and how far that may be wrong."""
    answers: dict[str, Any] = {}
    until = time.monotonic() + CLOCKS_DEADLINE_S
    for name, actor in awake.items():
        best: tuple[float, float] | None = None
        for _ in range(CLOCK_TRIES):
            left = min(CLOCK_DEADLINE_S, until - time.monotonic())
            before = time.time_ns()
            there = _collect({name: actor.clock.remote()}, left)[name]
            after = time.time_ns()
            if isinstance(there, Silent):  # busy with another question, perhaps
                answers.setdefault(name, there)
                continue
            error_s = (after - before) / 2e9
            if best is None or error_s < best[1]:
                best = ((there - (before + after) / 2) / 1e9, error_s)
            answers[name] = best
    return answers


def _collect(refs: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
    """Each node's answer, or Silent."""
    if not refs:
        return {}
    ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=max(0.0, deadline_s))
    answered = set(ready)
    return {node: _answer(ref) if ref in answered else Silent("no answer in time") for node, ref in refs.items()}


def _answer(ref: Any) -> Any:
    try:
        return ray.get(ref, timeout=END_DEADLINE_S)
    except ray.exceptions.RayTaskError as e:
        cause = e.cause if e.cause is not None else e
        return Silent(redacted(f"{type(cause).__name__}: {cause}".splitlines()[0]))
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as e:
        return Silent(redacted(f"{type(e).__name__}: {last_line(e)}"))


def _told(answers: Mapping[str, Any]) -> dict[str, Any]:
    return {node: answer for node, answer in answers.items() if not isinstance(answer, Silent)}


def _within(deadline_s: float, work: Callable[[], T]) -> T | Silent:
    """The result of `work`; Silent when it fails or takes too long. A thread that hangs does not keep this process."""
    result: list[T | Silent] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as e:
            result.append(Silent(redacted(f"{type(e).__name__}: {e}")))

    thread = threading.Thread(target=run, name="doctor", daemon=True)
    thread.start()
    thread.join(deadline_s)
    return result[0] if result else Silent(f"no answer within {deadline_s:g} s")


def token_problem(spec: JobSpec) -> str:
    """Who else could read or replace the run's token on this machine; empty when nobody can."""
    path = driver.token_path(spec.cluster.log_dir, spec.run.name)
    try:
        found = path.stat()
    except OSError:
        found = None
    if found is not None and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return f"{path} has mode {stat.S_IMODE(found.st_mode):o}: others can read or write it"
    if found is not None and found.st_uid != os.getuid():
        return f"{path} belongs to user {found.st_uid}, not to {os.getuid()}"
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return f"{folder} has mode {stat.S_IMODE(mode):o}: everybody can put another token there"
    return ""


def document(spec: JobSpec, findings: Iterable[Finding]) -> dict[str, Any]:
    """The outcome as a JSON object."""
    found = list(findings)
    return {
        "run": spec.run.name,
        "verdict": verdict(found),
        "needs": list(need_of(spec).arithmetic),
        "findings": [dataclasses.asdict(finding) for finding in found],
    }


def verdict(findings: Iterable[Finding]) -> str:
    levels = {finding.level for finding in findings}
    return next((level for level in ("problem", "warning") if level in levels), "ok")


def show(spec: JobSpec, findings: list[Finding]) -> None:
    """The arithmetic, a table of what was found, and the verdict."""
    console = new_console()
    for line in need_of(spec).arithmetic:
        console.print(line, markup=False)
    table = Table("check", "", "nodes", "seen", "needed", "what to do")
    styles = {"ok": "green", "warning": "yellow", "problem": "red"}
    for f in _collapsed(findings):
        cells = (escape(cell) for cell in (_nodes(f.nodes), f.seen, f.need, f.advice))
        table.add_row(f.check, f"[{styles[f.level]}]{f.level}[/]", *cells)
    console.print(table)
    counts = {level: sum(f.level == level for f in findings) for level in ("problem", "warning")}
    outcome = verdict(findings)
    text = {"ok": "ready", "warning": "ready, with warnings", "problem": "not ready"}[outcome]
    console.print(f"{text}: {counts['problem']} problems, {counts['warning']} warnings", style=styles[outcome])


def _collapsed(findings: list[Finding]) -> list[Finding]:
    """All that is well of one check in one finding, which shows what was seen first."""
    shown: dict[tuple[str, ...], Finding] = {}
    for number, f in enumerate(findings):
        what = f.seen.partition(":")[0] if f.check == "disk" else ""
        key = (f.check, what) if f.level == "ok" else (str(number),)
        before = shown.get(key)
        shown[key] = f if before is None else dataclasses.replace(before, nodes=before.nodes + f.nodes)
    return list(shown.values())


def _nodes(nodes: tuple[str, ...]) -> str:
    return "" if not nodes else nodes[0] if len(nodes) == 1 else f"{nodes[0]} and {len(nodes) - 1} more"
