"""A script of the user's as a job: built from a command line, and looked for on a node before it runs there."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from orchestrator.spec import JobSpec, SpecError, parse, read_document
from trainer.contract import ScriptConfig

OWN_PACKAGES = ("orchestrator", "shepherd", "storage", "trainer")
"""Top-level names that are taken in a worker's process before the script runs."""


def spec_of_command(
    command: list[str],
    *,
    file: str = "",
    overrides: list[str],
    name: str = "",
    nodes: int | None = None,
    procs_per_node: int | None = None,
    resume: bool = False,
) -> JobSpec:
    """The job that `shepherd run` starts: `file` where there is one, else defaults; the arguments go before both.

    Without a name the run is called after its script and the time, so that the same command can be given again.

    Raises:
        SpecError: it is no job that can run.
    """
    document = read_document(file, overrides)
    sections: dict[str, dict[str, Any]] = {}
    for section in ("run", "script", "cluster"):
        value = document.get(section, {})
        if not isinstance(value, dict):
            raise SpecError(f"{section} = {value!r}: must be a table, [{section}]")
        sections[section] = dict(value)
    if command:
        sections["script"]["command"] = command
    if not sections["script"].get("command"):
        raise SpecError("no script: give its command behind --, as in shepherd run -- python train.py")
    if nodes is not None:
        sections["script"]["nodes"] = nodes
    if procs_per_node is not None:
        sections["cluster"]["slots_per_node"] = procs_per_node
    if name:
        sections["run"]["name"] = name
    elif not sections["run"].get("name"):
        if resume:
            raise SpecError("--resume: give the --name of the run, which `shepherd run` has shown when it began")
        sections["run"]["name"] = _own_name(sections["script"]["command"])
    return parse(document | sections)


def _own_name(command: Any) -> str:
    target = ScriptConfig(command=tuple(map(str, command))).target if isinstance(command, list) else ()
    which = target[1] if target[:1] == ("-m",) and len(target) > 1 else Path(target[0]).stem if target else "script"
    stem = re.sub(r"[^a-z0-9]+", "-", which.lower()).strip("-")[:24].rstrip("-") or "script"
    return f"{stem}-{time.strftime('%m%d-%H%M%S')}"


def script_problems(script: ScriptConfig) -> list[str]:
    """Why a script cannot run on this machine, a line each."""
    folder, target = Path(script.folder).expanduser(), script.target
    if not folder.is_dir():
        return [f"script.folder = {script.folder!r}: is not there; every node must have it at the same place"]
    if target[0] == "-m":
        beside = folder
    else:
        path = folder / target[0]
        if not path.is_file():
            return [f"script.command: {path} is not there; every node must have the script at the same place"]
        beside = Path(os.path.realpath(path)).parent
    if beside == Path(__file__).resolve().parent.parent:  # they are Shepherd's own there
        return []
    taken = [name for name in OWN_PACKAGES if (beside / f"{name}.py").is_file() or (beside / name).is_dir()]
    return [
        f"script.command: {beside / name} would not be found by `import {name}`, which is Shepherd's own package in a "
        "worker; give it another name"
        for name in taken
    ]
