"""The terminal's view of a run: a progress line under the news on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from orchestrator.core.goodput import LABELS
from orchestrator.core.state import DISTRUSTED, EXIT_STOPPED
from orchestrator.observe.notices import by_process
from orchestrator.observe.status import Status
from orchestrator.spec import JobSpec
from storage.redact import redacted

PLAIN_INTERVAL_S = 10.0
"""Between two lines of progress where there is no terminal, as in a job's log."""

NODES_SHOWN = 16
"""Of one state, by name: two lines of a terminal."""
CHECKPOINTS_SHOWN = 8

Show = Callable[[Status, list[str]], None]

logger = logging.getLogger(__name__)


@contextmanager
def view(spec: JobSpec) -> Iterator[Show]:
    """A function to call with each picture and its news, and the display around it."""
    console = new_console()
    what = shlex.join(spec.script.command) if spec.is_script else f"{spec.run.steps} steps"
    with may_be_lost():
        console.print(f"run {spec.run.name}: {redacted(what)}, state in {redacted(spec.run.url)}", markup=False)
    if not sys.stdout.isatty():
        yield _lossy(_plain(console))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("waiting", total=None if spec.is_script else spec.run.steps, figures="")

        def show(status: Status, news: list[str]) -> None:
            for line in news:
                progress.console.print(f"{_clock(status)} {line}", markup=False)
            progress.update(task, description=status.job, completed=status.step, figures=figures(status))

        yield _lossy(show)


@contextmanager
def may_be_lost() -> Iterator[None]:
    """A full disk under standard output, or a pipe whose reader is gone, costs what was to be shown from there on.

    Neither the run, which would end with its driver, nor its exit code: Python's own is another one where standard
    output cannot be flushed at its end.
    """
    try:
        yield
    except (OSError, UnicodeError, SystemExit) as e:  # the last is rich's answer to a broken pipe
        logger.warning("standard output cannot be written, and nothing more is shown: %r", e)
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _lossy(show: Show) -> Show:
    def lossy(status: Status, news: list[str]) -> None:
        with may_be_lost():
            show(status, news)

    return lossy


def _plain(console: Console) -> Show:
    told_at = 0.0

    def show(status: Status, news: list[str]) -> None:
        nonlocal told_at
        for line in news:
            console.print(f"{_clock(status)} {line}", markup=False)
        if status.job == "training" and time.monotonic() - told_at > PLAIN_INTERVAL_S:
            told_at = time.monotonic()
            console.print(f"{_clock(status)} step {_steps(status, '/')} {figures(status)}", markup=False)

    return show


def _steps(status: Status, of: str) -> str:
    return f"{status.step}{of}{status.total_steps}" if status.total_steps else str(status.step)


def figures(status: Status) -> str:
    """The newest numbers of a run on one line."""
    parts = []
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.tokens_per_s is not None:
        parts.append(f"{status.tokens_per_s:,.0f} tokens/s")
    if status.goodput is not None:
        parts.append(f"goodput {status.goodput:.1%}")
    if status.fallback:
        parts.append(f"fallback mesh {status.fallback}")
    elif status.replicas < status.replicas_declared:
        parts.append(f"{status.replicas} of {status.replicas_declared} replicas")
    if status.hold:
        parts.append("HOLD")
    return "  ".join(parts)


def print_status(status: Status) -> None:
    """A run on one screen."""
    console = new_console()
    ready = sum(state in ("active", "spare") for state in status.nodes.values())
    newest = "none" if status.newest_checkpoint is None else status.newest_checkpoint
    console.print(
        f"run {status.run}: {status.job}, step {_steps(status, ' of ')}, generation {status.generation}, "
        f"epoch {status.epoch}\n{figures(status)}\n{ready} of {status.places} places filled, newest checkpoint "
        f"{newest}, metrics http://{status.metrics_address}/metrics",
        markup=False,
    )
    for line in _nodes(status):
        console.print(line, markup=False)
    for line in _checkpoints(status):
        console.print(line, markup=False)
    because = f": {status.save_every_why}" if status.save_every_why else ", as the job says"
    console.print(f"a checkpoint each {status.save_every_steps} steps{because}", markup=False)
    if status.hold:
        hold = f"HOLD: nothing is decided until the journal can be written: {status.hold}"
        console.print(hold, style="red", markup=False)
    print_incidents(console, status)
    print_ledger(console, status)


def _nodes(status: Status) -> list[str]:
    """The nodes by state; of many the first, since a mesh of thousands is not read."""
    names: dict[str, list[str]] = {}
    for name in dict.fromkeys((*status.mesh, *status.nodes)):
        if status.nodes[name] != "lost":
            standing = f" ({status.standings[name]})" if name in status.standings else ""
            names.setdefault(status.nodes[name], []).append(name + standing)
    more = {state: f" and {len(of) - NODES_SHOWN} more" if len(of) > NODES_SHOWN else "" for state, of in names.items()}
    return [f"{state}: {', '.join(of[:NODES_SHOWN])}{more[state]}" for state, of in names.items()]


def _checkpoints(status: Status) -> list[str]:
    """What is thought of each checkpoint; of many the newest, and of each that is not to be trusted why."""
    if not status.trust:
        return []
    words = [f"{c.step} {c.trust}{' (pinned)' * c.pinned}{' in doubt' * bool(c.doubt)}" for c in status.trust]
    more = f"{len(words) - CHECKPOINTS_SHOWN} older and " if len(words) > CHECKPOINTS_SHOWN else ""
    reading = f"; {status.verifying} is being read back" if status.verifying is not None else ""
    lines = [f"checkpoints: {more}{', '.join(words[-CHECKPOINTS_SHOWN:])}{reading}"]
    bad = [c for c in status.trust if c.trust in DISTRUSTED]
    lines += [f"checkpoint {c.step} is {c.trust}, says {c.by or 'an older controller'}: {c.why}" for c in bad]
    lines += [f"checkpoint {c.step} is in doubt, says {c.doubt}" for c in status.trust if c.doubt]
    lines += [f"node {node} computes more slowly than its peers" for node in status.slow]
    return lines + [f"node {node} has misread {what}" for node, what in status.misread.items()]


def print_end(status: Status, log_dir: str) -> None:
    """What became of a run."""
    with may_be_lost():
        _print_end(new_console(), status, log_dir)


def _print_end(console: Console, status: Status, log_dir: str) -> None:
    print_incidents(console, status)
    print_ledger(console, status)
    if status.exit_code not in (0, None) or status.failure:
        last = next(reversed(status.tracebacks), "").partition("-")[0]
        who = next((key for key in status.tracebacks if key.startswith(f"{last}-")), None)
        if who is not None and status.exit_code != EXIT_STOPPED:
            text = status.tracebacks[who]
            console.print(f"the worker's own traceback ({who}):\n{text}", markup=False)
        console.print(f"logs of this node: {log_dir}", markup=False)
    style = "green" if status.exit_code == 0 and not status.failure else "red"
    console.print(status.failure or status.verdict, style=style, markup=False)


def print_incidents(console: Console, status: Status) -> None:
    """The interruptions, a row each."""
    if not status.incidents:
        return
    table = Table("#", "at", "cause", "node", "rung", "teardown", "restart", "restore", "first step", "total", "lost")
    for i in status.incidents:
        phases = (i.teardown_s, i.restart_s, i.restore_s, i.first_step_s, i.total_s)
        cells = ("-" if s is None else f"{s:.2f} s" for s in phases)
        what = escape(f"{i.cause}: {i.detail}"[:40])
        table.add_row(str(i.number), f"{i.at_s:.1f} s", what, i.culprit, i.rung, *cells, f"{i.steps_lost} steps")
    console.print(table)


def print_ledger(console: Console, status: Status) -> None:
    """Where the nodes' time went. The labels and the step in flight add up to wall-clock x places."""
    if not status.owed_us:
        return
    table = Table("label", "node-seconds", "share", "what it is")
    for label, us in status.ledger_us.items():
        if us:
            text = LABELS[label]  # type: ignore[index]
            table.add_row(label, f"{us / 1e6:,.1f}", f"{us / status.owed_us:.1%}", text)
    if status.pending_us:
        table.add_row("(in flight)", f"{status.pending_us / 1e6:,.1f}", f"{status.pending_us / status.owed_us:.1%}", "")
    total = sum(status.ledger_us.values()) + status.pending_us
    table.add_row("sum", f"{total / 1e6:,.1f}", f"{total / status.owed_us:.1%}", f"{status.places} places x wall-clock")
    console.print(table)
    if filled := by_process(status.processes):
        console.print(f"slots filled, over all generations: {filled}")


def new_console() -> Console:
    """On a terminal as wide as that is; in a log, wide enough for the tables."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 130)


def _clock(status: Status) -> str:
    minutes, seconds = divmod(status.wall_clock_s, 60)
    return f"[{int(minutes):3d}:{seconds:04.1f}]"
