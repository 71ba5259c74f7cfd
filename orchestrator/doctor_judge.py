"""What facts about nodes mean for a run: facts in, findings out. Pure; `shepherd doctor` gathers the facts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from orchestrator.doctor_node import MEMORY_FILE_SYSTEMS, Limits, Memory, Place
from orchestrator.need import LOG_BYTES, Need, checkpoints_at_once, need_of, size
from orchestrator.spec import JobSpec

CLOCK_WARNING_S = 1.0
"""Lines of logs and points of metrics from two nodes are told apart by about a second."""
CLOCK_PROBLEM_S = 300.0
"""Kerberos and signed requests are refused beyond 5 minutes (RFC 4120; AWS and Azure allow 15)."""
TIGHT = 1.2
"""Where less than so much of what is needed is there, it is called tight: activations and buffers are not counted."""
CACHE_BYTES = 1024**3
"""Free space below which a node may not hold a corpus: token shards take about half the bytes of the text."""

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    check: str
    level: Level
    nodes: tuple[str, ...]
    """Where; empty when it concerns the run as a whole."""
    seen: str
    need: str = ""
    advice: str = ""
    """What to do; empty when all is well."""


@dataclass(frozen=True)
class Silent:
    """A node's missing answer, and why."""

    why: str


Answers = Mapping[str, Any]
"""Node to its answer, or Silent."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that was asked. Nodes are named as people know them."""

    here: str
    """This machine, on which the command runs."""
    head: str
    """The node on which the controller and the metrics will be; empty when it could not be found."""
    candidates: tuple[str, ...]
    """Nodes that the run could take."""
    free: int
    """Those of them that nobody else holds now."""
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Check to node to answer."""
    local: tuple[str, ...] = ()
    """What stands in the way on this machine, as `shepherd train` would say it."""
    started: bool = False
    """Whether a run was started under run.url."""
    active: bool = False
    """Whether the run is under way on this cluster."""
    token: str = ""
    """What is wrong with the run's token file; empty when nothing is."""


def judge(spec: JobSpec, facts: Facts) -> list[Finding]:
    """The findings, in a fixed order."""
    need = need_of(spec)
    answers = defaultdict(dict, facts.answers)
    copies = spec.layout.nodes + spec.layout.spares
    return [
        *_job(facts),
        *_nodes(spec, facts),
        *_silent(facts),
        *_shared_memory(need, answers["ram_dir"], copies),
        *_memory(need, answers["memory"], copies),
        *_open_files(need, answers["limits"]),
        *_processes(need, answers["limits"]),
        *_metrics_port(spec, answers["metrics_port"]),
        *_connections(answers["dial"]),
        *_clocks(answers["clock"], facts.here),
        *_versions(answers["versions"], answers["numeric"]),
        *_shared(spec, answers["sees"]),
        *_writable(answers["probe"]),
        *_disk(spec, need, answers, facts.started),
        *_devices(spec, need, answers["numeric"], facts.candidates),
        *_token(facts),
    ]


def _said(check: str, nodes: tuple[str, ...], level: Level, seen: str, need: str = "", advice: str = "") -> Finding:
    advice = "" if level == "ok" else advice
    return Finding(check=check, level=level, nodes=nodes, seen=seen, need=need, advice=advice)


def _told(answers: Answers) -> dict[str, Any]:
    return {node: answer for node, answer in answers.items() if not isinstance(answer, Silent)}


def _against(have: int, need: int) -> Level:
    return "problem" if have < need else "warning" if have < TIGHT * need else "ok"


def _job(facts: Facts) -> list[Finding]:
    here, mend = (facts.here,), "mend what the message names"
    found = [_said("job", here, "problem", line, advice=mend) for line in facts.local]
    if facts.active:
        advice = "follow it with shepherd status, end it with shepherd stop, or give run.name another value"
        found.append(_said("job", (), "problem", "the run is active now", advice=advice))
    seen = "can be resumed from here (--resume)" if facts.started else "can be started from here"
    return found or [_said("job", here, "ok", seen)]


def _nodes(spec: JobSpec, facts: Facts) -> list[Finding]:
    layout = spec.layout
    level: Level = "ok"
    advice = ""
    if facts.free < layout.nodes:
        level, advice = "problem", "add nodes with `ray start`, end what holds them, or make the mesh smaller"
    elif facts.free < layout.nodes + layout.spares:
        level, advice = "warning", "add nodes: without its spares the run waits when one is lost"
    seen = f"{len(facts.candidates)} nodes fit, {facts.free} of them are free"
    return [_said("nodes", (), level, seen, f"{layout.nodes} for the mesh, {layout.spares} spare", advice)]


def _silent(facts: Facts) -> list[Finding]:
    why: dict[str, list[str]] = defaultdict(list)
    for check, by_node in facts.answers.items():
        if check == "probe":
            continue  # the store's own words are a finding of their own
        for node, answer in by_node.items():
            if isinstance(answer, Silent):
                why[node].append(f"{check}: {answer.why}")
    advice = "look at the node: a mount that hangs, an installation that differs, or no free memory"
    return [_said("answers", (node,), "problem", "; ".join(lines), advice=advice) for node, lines in why.items()]


def _shared_memory(need: Need, answers: Answers, copies: int) -> list[Finding]:
    found = []
    places: dict[str, Place] = _told(answers)
    sharing = Counter(place.device for place in places.values())
    for node, place in places.items():
        nodes_here = min(sharing[place.device], copies)
        level = _against(place.free_bytes, need.ram_bytes * nodes_here)
        advice = f"enlarge {place.path} (docker: --shm-size; Kubernetes: an emptyDir of medium Memory; mount -o "
        advice += "remount,size=), remove snapshots of runs that are over, or set cluster.ram_dir"
        if not place.writable:
            level, advice = "problem", f"give this user {place.path}, or set cluster.ram_dir"
        elif place.type and place.type not in MEMORY_FILE_SYSTEMS and level == "ok":
            level = "warning"
            advice = f"set cluster.ram_dir to a tmpfs: on {place.type} each step waits for the disk"
        seen = f"{place.path} ({place.type or 'unknown'}): {size(place.free_bytes)} free of {size(place.size_bytes)}"
        seen += "" if place.writable else ", not writable"
        found.append(_said("shared memory", (node,), level, seen, _for(need.ram_bytes, nodes_here), advice))
    return merged(found)


def _for(n_bytes: int, nodes_here: int) -> str:
    return size(n_bytes * nodes_here) + (f" for {nodes_here} nodes on one machine" if nodes_here > 1 else "")


def _memory(need: Need, answers: Answers, copies: int) -> list[Finding]:
    found = []
    told: dict[str, Memory] = _told(answers)
    sharing = Counter(memory.pool for memory in told.values())
    advice = "give the node or its container more memory, shard over more ranks, or fill nodes with fewer slots"
    for node, memory in told.items():
        nodes_here = min(sharing[memory.pool], copies)
        available, seen = memory.available_bytes, f"{size(memory.available_bytes)} available"
        limit = memory.limit_free_bytes
        if limit is not None and limit < available and memory.limit_bytes is not None:
            available = limit
            seen = f"{size(limit)} left of the cgroup's limit of {size(memory.limit_bytes)}"
        level = _against(available, need.memory_bytes * nodes_here)
        found.append(_said("memory", (node,), level, seen, _for(need.memory_bytes, nodes_here), advice))
    return merged(found)


def _open_files(need: Need, answers: Answers) -> list[Finding]:
    found = []
    limits: Limits
    for node, limits in _told(answers).items():
        files = limits.files
        level: Level = "problem" if files is not None and files < need.files else "ok"
        advice = f"`ulimit -n {max(65536, need.files)}` before `ray start`, LimitNOFILE= in its unit"
        if limits.files_hard is not None and limits.files_hard < need.files:
            advice += f"; the hard limit is {limits.files_hard}: raise it in limits.conf or the container's settings"
        seen = "unlimited" if files is None else f"{files} in a process"
        found.append(_said("open files", (node,), level, seen, str(need.files), advice))
    return merged(found)


def _processes(need: Need, answers: Answers) -> list[Finding]:
    found = []
    limits: Limits
    for node, limits in _told(answers).items():
        left: list[tuple[int, str, str]] = []
        if limits.processes is not None:
            room = limits.processes - limits.threads
            left.append((room, f"RLIMIT_NPROC {limits.processes}", "raise `ulimit -u` before `ray start`"))
        if limits.cgroup_tasks is not None:
            room = limits.cgroup_tasks - limits.cgroup_tasks_now
            left.append((room, f"pids cgroup {limits.cgroup_tasks}", "raise pids.max (docker: --pids-limit)"))
        free, limit, advice = min(left, default=(need.threads, "", ""))
        level: Level = "ok" if free >= need.threads else "problem"
        seen = f"{free} threads left of {limit}" if left else "no limit"
        found.append(_said("processes", (node,), level, seen, f"{need.threads} threads", advice))
    return merged(found)


def _metrics_port(spec: JobSpec, answers: Answers) -> list[Finding]:
    where = f"{spec.metrics.bind}:{spec.metrics.port}"
    free = f"{where} is free" if spec.metrics.port else "any free one"
    advice = "choose another metrics.port (0 for any), or end what listens there"
    return [
        _said("metrics port", (node,), "problem" if why else "ok", f"{where}: {why}" if why else free, advice=advice)
        for node, why in _told(answers).items()
    ]


def _connections(answers: Answers) -> list[Finding]:
    need = "every node reaches every other's Ray address on any port"
    advice = (
        "open ports 1024-65535 between the nodes; start Ray with --node-ip-address when a node registered one that "
    )
    advice += "others cannot reach"
    found: list[Finding] = []
    told: dict[str, dict[str, str]] = _told(answers)
    for node, peers in told.items():
        failed = ", ".join(f"{peer} ({why})" for peer, why in peers.items() if why)
        if failed:
            found.append(_said("connections", (node,), "problem", f"cannot reach {failed}", need, advice))
    tried = sum(len(peers) for peers in told.values())
    if tried and not found:
        found = [_said("connections", tuple(told), "ok", f"{tried} of {tried} made")]
    return found


def _clocks(answers: Answers, here: str) -> list[Finding]:
    found = []
    advice = "run chrony or systemd-timesyncd there; stores refuse requests signed at a wrong time, and logs cannot be "
    advice += "put in order"
    bound = f"within {CLOCK_WARNING_S:g} s"
    for node, (offset_s, error_s) in _told(answers).items():
        skew = max(0.0, abs(offset_s) - error_s)  # what is certain of it
        level: Level = "problem" if skew > CLOCK_PROBLEM_S else "warning" if skew > CLOCK_WARNING_S else "ok"
        seen = f"{bound} of {here}" if level == "ok" else f"{offset_s:+.1f} s from {here}"
        found.append(_said("clock", (node,), level, seen, bound, advice))
    return merged(found)


def _versions(versions: Answers, numeric: Answers) -> list[Finding]:
    told: dict[str, dict[str, str]] = {node: dict(found) for node, found in _told(versions).items()}
    for node, found in _told(numeric).items():
        told.setdefault(node, {}).update(found["numeric_class"])
    advice = "give all nodes the same image or environment, and processors of one kind: else results differ in their "
    advice += "bits, and messages may not be understood"
    odd: list[Finding] = []
    for name in sorted({name for found in told.values() for name in found}):
        values = {node: found[name] for node, found in told.items() if name in found}
        ((usual, _),) = Counter(values.values()).most_common(1)
        others = [
            _said("versions", (node,), "problem", f"{name} {value}", f"{name} {usual}, as the others have", advice)
            for node, value in values.items()
            if value != usual
        ]
        odd += merged(others)
    if odd or not told:
        return odd
    common = {name: value for found in told.values() for name, value in found.items()}
    return [_said("versions", tuple(told), "ok", ", ".join(f"{name} {common[name]}" for name in sorted(common)))]


def _shared(spec: JobSpec, answers: Answers) -> list[Finding]:
    advice = "run.url is a local path there: give it a path that all nodes mount, or a store such as s3://"
    if "://" in spec.run.url:
        advice = "give all nodes the same credentials and endpoint (environment of `ray start`)"
    lost = "a record that another node wrote there is not there"
    found = [
        _said("shared run.url", (node,), "ok" if sees else "problem", "the same from all" if sees else lost, "", advice)
        for node, sees in _told(answers).items()
    ]
    return merged(found)


def _writable(answers: Answers) -> list[Finding]:
    advice = "mend what the message names; `ray start` must see the store's credentials"
    found = [
        _said("run.url", (node,), "problem", answer.why, "", advice)
        if isinstance(answer, Silent)
        else _said("run.url", (node,), "ok", "written, and created exclusively")
        for node, answer in answers.items()
    ]
    return merged(found)


def _disk(spec: JobSpec, need: Need, answers: Mapping[str, Answers], started: bool) -> list[Finding]:
    """A run that was started has some of its checkpoints there: what they take is not wanted again."""
    rooms = [
        (
            "run.url",
            answers.get("run_dir", {}),
            checkpoints_at_once(spec) * need.checkpoint_bytes,
            True,
        ),
        ("temporary files", answers.get("temporary", {}), need.part_bytes, True),
        ("cluster.log_dir", answers.get("log_dir", {}), LOG_BYTES, False),
        ("data.cache_dir", answers.get("cache_dir", {}), CACHE_BYTES, False),
    ]
    found = []
    for name, told, wanted, must in rooms:
        place: Place
        for node, place in _told(told).items():
            level = _against(place.free_bytes, wanted)
            enough = started and name == "run.url" and place.free_bytes >= need.checkpoint_bytes
            if level == "problem" and (enough or not must):
                level = "warning"
            advice = "free space there, " + ("lower checkpoint.keep, " if name == "run.url" else "")
            advice += "or set TMPDIR for `ray start`" if name == "temporary files" else f"or choose another {name}"
            seen = f"{name}: {size(place.free_bytes)} free on {place.path}"
            if not place.writable:
                level, seen, advice = "problem", f"{seen}, not writable", f"let this user write there: {advice}"
            found.append(_said("disk", (node,), level, seen, size(wanted), advice))
    return merged(found)


def _devices(spec: JobSpec, need: Need, answers: Answers, candidates: tuple[str, ...]) -> list[Finding]:
    if spec.cluster.device != "cuda":
        return []
    slots, found = spec.cluster.slots_per_node, []
    wanted = f"{slots} devices with {size(need.device_bytes)} and the activations each"
    for node, answer in _told(answers).items():
        if node not in candidates:
            continue
        devices = answer["devices"]
        names = ", ".join(f"{n} x {name}" for name, n in Counter(d["name"] for d in devices).items()) or "none"
        free = min((d["free_bytes"] for d in devices), default=0)
        level: Level = "ok"
        advice = ""
        if len(devices) < slots:
            level, advice = "problem", "lower cluster.slots_per_node, or mend driver and container (nvidia-smi)"
        elif free < need.device_bytes:
            level, advice = "problem", "end what holds the devices' memory, or shard over more ranks"
        found.append(_said("cuda", (node,), level, f"{names}; {size(free)} free on the fullest", wanted, advice))
    return merged(found)


def _token(facts: Facts) -> list[Finding]:
    advice = "chmod 600 the file and 700 its folder, and start the run anew: who has read it can stop the run"
    seen = facts.token or "nobody else can read or replace it"
    return [_said("token", (facts.here,), "problem" if facts.token else "ok", seen, advice=advice)]


def merged(findings: list[Finding]) -> list[Finding]:
    """One finding for all nodes of which the same is to be said."""
    nodes: dict[Finding, tuple[str, ...]] = {}
    for f in findings:
        said = replace(f, nodes=())
        nodes[said] = (*nodes.get(said, ()), *f.nodes)
    return [replace(said, nodes=where) for said, where in nodes.items()]
