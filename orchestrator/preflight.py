"""Checks before anything starts: each failure names the field, what is there, and what to do."""

from __future__ import annotations

import asyncio
import glob
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import ray

from orchestrator import identity
from orchestrator.runtime import journal
from orchestrator.runtime.controller import namespace_of
from orchestrator.runtime.nodes import HEAD_RESOURCE, bundle_of, eligible, sweep
from orchestrator.runtime.preparation import run_log_dir
from orchestrator.scripts import script_problems
from orchestrator.spec import JobSpec
from storage.urls import StoreError, probe

RELEASE_DEADLINE_S = 10.0
"""For nodes that another run holds: one that is ending gives them back within seconds."""


class PreflightError(RuntimeError):
    """The run cannot start here and now. One line for each thing to mend."""


def check_local(spec: JobSpec, resume: bool) -> None:
    """Everything that can be known without the cluster.

    Raises:
        PreflightError: with all problems that were found.
    """
    problems = problems_here(spec, resume)
    if problems:
        raise PreflightError("\n".join(problems))


def problems_here(spec: JobSpec, resume: bool) -> list[str]:
    """What is wrong with the folders and the corpus, or the script, as this machine sees them, a line each."""
    program = script_problems(spec.script) if spec.is_script else _corpus(spec)
    return [*_run_directory(spec, resume), *_log_directory(spec), *program]


def check_cluster(spec: JobSpec) -> None:
    """Whether the Ray cluster has the nodes that the mesh needs, and a place for the metrics. Needs a connected Ray.

    Raises:
        PreflightError: it has not.
    """
    problems = _metrics_port(spec) if _head_is_here() else []  # elsewhere, the controller itself finds out
    if problems:
        raise PreflightError("\n".join(problems))
    _end_leftovers(spec)
    layout, deadline = spec.layout, time.monotonic() + RELEASE_DEADLINE_S
    while True:
        found = eligible(spec)
        free = sum(node.free for node in found)
        if free >= layout.nodes:
            return
        if len(found) < layout.nodes or time.monotonic() > deadline:
            break
        time.sleep(0.5)  # what another run has just released is on its way to Ray's view
    needs = ", ".join(f"{amount:g} {name}" for name, amount in bundle_of(spec).items())
    raise PreflightError(
        f"not enough nodes: the mesh of {layout.slots} slots needs {layout.nodes} live Ray nodes with {needs} each "
        f"(cluster.slots_per_node = {layout.slots_per_node}), the cluster has {len(found)}, of which {free} are free. "
        "Add nodes with `ray start`, or make the mesh smaller ([parallel]) or the nodes fuller (cluster.slots_per_node)"
    )


def _run_directory(spec: JobSpec, resume: bool) -> list[str]:
    url = spec.run.url
    if "/runtime_resources/working_dir_files/" in url:  # where Ray unpacks what `ray job submit` uploads
        return [f"run.url = {url!r}: lies in this job's temporary folder, which Ray deletes; set it in the spec"]
    try:
        if "://" not in url:
            Path(url).mkdir(parents=True, exist_ok=True)
        probe(url)
        started = journal.exists(url)
    except (StoreError, OSError) as e:
        return [str(e) if isinstance(e, StoreError) else f"run.url = {url!r}: cannot be written: {e}"]
    if started and not resume:
        return [f"run.url = {url!r}: a run was started there; go on with it by --resume, or choose another run.url"]
    if resume and not started:
        return [f"run.url = {url!r}: there is no run to resume; start it without --resume"]
    return changed_since_start(spec)


def changed_since_start(spec: JobSpec) -> list[str]:
    """What keeps this job from resuming the run that was started under run.url; nothing when there is none."""
    try:
        return identity.changes(spec)
    except Exception as e:  # every store has its own
        return [str(e) if isinstance(e, identity.RecordError) else f"{identity.RECORD} cannot be read: {e!r}"]


def _log_directory(spec: JobSpec) -> list[str]:
    folder = run_log_dir(spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return []
    except OSError as e:
        return [f"cluster.log_dir = {spec.cluster.log_dir!r}: cannot be written here: {e}"]


def _corpus(spec: JobSpec) -> list[str]:
    corpus = spec.data.corpus
    if corpus == "python-stdlib":
        return []
    try:
        fs, path = fsspec.core.url_to_fs(corpus)
        found = fs.glob(path) if glob.has_magic(path) else fs.exists(path)
    except Exception as e:
        return [f"data.corpus = {corpus!r}: cannot be read: {e}"]
    if not found:
        return [f"data.corpus = {corpus!r}: nothing is there; give a folder, a glob of text files, or python-stdlib"]
    return []


def _head_is_here() -> bool:
    """Whether this machine is the cluster's head node, on which the controller and its metrics will be."""
    here = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return any(node["NodeID"] == here and HEAD_RESOURCE in node["Resources"] for node in nodes)


def _end_leftovers(spec: JobSpec) -> None:
    """A controller that could not end its run has left agents that hold the very nodes which a resume needs."""
    namespace = namespace_of(spec.run.name)
    try:
        ray.get_actor("controller", namespace)
    except ValueError:
        asyncio.run(sweep(namespace, set()))


def _metrics_port(spec: JobSpec) -> list[str]:
    bind, port = spec.metrics.bind, spec.metrics.port
    why = bind_problem(bind, port) if port else ""
    return [f"metrics.port = {port}: cannot be bound on {bind}: {why}; choose another, or 0 for any"] if why else []


def bind_problem(host: str, port: int) -> str:
    """Why a server cannot listen at this address of this machine; empty when it can."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.create_server(address, family=family):
            return ""
    except OSError as e:
        return str(e.strerror or e)
