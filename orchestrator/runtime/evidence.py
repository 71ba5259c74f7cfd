"""What an incident can be judged by afterwards: last words of workers, stacks and flight records, under run.url."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from orchestrator.runtime.nodes import AgentHandle, call
from orchestrator.runtime.reports import record_name, stack_name
from storage.redact import redacted
from storage.urls import write_exclusive
from trainer import contract

TRACEBACKS = 16
TRACEBACKS_OF_ONE = 4
"""Of one generation; a program's fault raises on every rank."""
STACK_DEADLINE_S = 10.0
"""For an agent to tell the stacks that it has read, three seconds after it began to at the latest. Flight
records are there by then."""


class Evidence:
    """Of one controller, in its epoch.

    Args:
        agent: of a node; raises when the node has none.
    """

    def __init__(
        self,
        url: str,
        epoch: int,
        agent: Callable[[str], AgentHandle],
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
    ) -> None:
        self._url, self._epoch = url, epoch
        self._agent, self._spawn = agent, spawn
        self.tracebacks: dict[str, str] = {}
        """The last words of failed workers, newest last."""
        self._consequences: set[str] = set()
        """Those of them that another's failure explains."""

    def keep_traceback(self, node: str, failed: contract.Failed) -> None:
        """Of each generation the first few, and a peer's broken exchange only when nothing else was said."""
        key = f"g{failed.generation}-r{failed.rank}"
        prefix = f"g{failed.generation}-"
        if failed.kind != "collective":
            for other in [k for k in self._consequences if k.startswith(prefix)]:
                self.tracebacks.pop(other, None)
        told = [k for k in self.tracebacks if k.startswith(prefix)]
        if key in told or len(told) >= TRACEBACKS_OF_ONE or (failed.kind == "collective" and told):
            return
        self.tracebacks[key] = redacted(failed.traceback)
        if failed.kind == "collective":
            self._consequences.add(key)
        while len(self.tracebacks) > TRACEBACKS:
            self.tracebacks.pop(next(iter(self.tracebacks)))
        text = f"node {node}, rank {failed.rank}, generation {failed.generation}, step {failed.step}\n"
        evidence = (text + self.tracebacks[key]).encode()
        self._spawn(asyncio.to_thread(write_exclusive, self._url, f"evidence/{key}.txt", evidence))

    async def keep_stack(self, node: str, rank: int, generation: int) -> None:
        """Where a rank that hangs stands goes into the evidence that its incident names; or why that is not known."""
        try:
            handle = self._agent(node)
            text = await call(handle.actor.stack.remote(self._epoch, generation, rank), STACK_DEADLINE_S)
        except Exception as e:
            text = f"no stack: the agent of {node} does not tell it: {type(e).__name__}: {e}"
        evidence = redacted(f"node {node}, rank {rank}, generation {generation}\n{text}")
        name = stack_name(generation, rank)
        await asyncio.to_thread(write_exclusive, self._url, name, evidence.encode())

    async def keep_record(self, node: str, rank: int, generation: int) -> None:
        """What a rank's flight recorder told goes into the evidence, as one JSON object; or why it is not known."""
        told: dict[str, Any] = {"node": node, "rank": rank, "generation": generation}
        try:
            handle = self._agent(node)
            entries = await call(handle.actor.flight_record.remote(self._epoch, generation, rank), STACK_DEADLINE_S)
            told["entries"] = json.loads(redacted(entries))
        except Exception as e:
            told["error"] = redacted(f"the agent of {node} does not tell it: {type(e).__name__}: {e}")
        name = record_name(generation, rank)
        await asyncio.to_thread(write_exclusive, self._url, name, json.dumps(told, indent=1).encode())
