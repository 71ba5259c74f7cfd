"""What a node needs before it may serve: the script, the run's data, devices that compute what is right. No torch here:
what needs it runs in processes of its own, with the environment that workers have.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.runtime import code as codes
from orchestrator.scripts import script_problems
from orchestrator.spec import JobSpec

logger = logging.getLogger(__name__)

PREPARE_DEADLINE_S = 1800.0
"""Training a tokenizer and tokenizing a corpus; gigabytes of text take minutes a core."""
ADMISSION_DEADLINE_S = 300.0
"""For the known products on each device of the node; the process imports torch first, and opens eight devices."""


class NotAdmitted(RuntimeError):
    """A device of this node computes what is wrong."""


def run_log_dir(spec: JobSpec) -> Path:
    """The node-local folder of this run's logs and journal tail."""
    return Path(spec.cluster.log_dir).expanduser() / spec.run.name


def worker_env(spec: JobSpec, packages: Path = codes.INSTALLED) -> dict[str, str]:
    """Environment of this node's worker and tool processes, the same on every node: it is part of the numeric class.

    Args:
        packages: folder of the packages that they import; what is not there is the installed one.
    """
    inherited = [str(codes.INSTALLED), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "OMP_NUM_THREADS": str(max(1, int(spec.cluster.cpus_per_slot))),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([str(packages), *inherited])),
    }


def check_script(spec: JobSpec, node: str) -> None:
    """Raises RuntimeError when the job's script cannot be run on this node."""
    problems = script_problems(spec.script)
    if problems:
        raise RuntimeError(f"on node {node}: {'; '.join(problems)}")


async def prepare_data(spec: JobSpec, node: str) -> str:
    """The digest of the token shards that this node feeds. Raises RuntimeError, with the tool's own message."""
    document = {"data": asdict(spec.data), "vocab_size": spec.model.vocab_size, "seed": spec.run.seed}
    told, error = await _tool(spec, "trainer.data.prepare", document, PREPARE_DEADLINE_S)
    if error:
        raise RuntimeError(f"the data cannot be prepared on {node}: {error}")
    return str(told["digest"])


async def check_devices(spec: JobSpec, node: str) -> str:
    """The devices of this node, and how fast they were at work whose result is known.

    Raises:
        RuntimeError: the work cannot be done; the message is the tool's own.
        NotAdmitted: a device is wrong.
    """
    told, error = await _tool(spec, "trainer.admission", {"device": spec.cluster.device}, ADMISSION_DEADLINE_S)
    if error:
        raise RuntimeError(f"the devices of {node} cannot be checked: {error}")
    wrong = [f"{device['name']}: {device['problem']}" for device in told if device["problem"]]
    if wrong:
        raise NotAdmitted(f"{node} computes what is wrong: {'; '.join(wrong)}")
    seen = ", ".join(f"{each['name']} {each['tflops']:.3g} TFLOP/s" for each in told)
    logger.info("%s: %s", node, seen)
    return seen


async def _tool(spec: JobSpec, module: str, document: dict[str, Any], deadline_s: float) -> tuple[Any, str]:
    """What a process prints that is started as workers are, and what it says of its failure, if it fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        module,
        env={**os.environ, **worker_env(spec)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(json.dumps(document).encode()), deadline_s)
    except TimeoutError:
        process.kill()
        raise
    if process.returncode != 0:
        return None, err.decode(errors="replace").strip() or f"exit code {process.returncode}"
    return json.loads(out.decode().strip().splitlines()[-1]), ""
