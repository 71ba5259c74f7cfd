"""`shepherd checkpoints` ls and verify: what lies under a run directory, and whether it is whole."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from orchestrator import identity
from orchestrator.need import size
from orchestrator.observe.report_words import duration
from orchestrator.runtime import journal
from storage import commits, pins, statements, urls
from storage.hugging_face import FormatError
from storage.manifest import DATA_DIR, Commit, ManifestError, commit_name
from storage.redact import redacted
from storage.urls import Store, StoreError, list_folders, locate

_FOLDER = re.compile(r"step-(\d{8,})-e\d+-g\d+")
_WRITTEN = ("LastModified", "mtime", "created")
"""Where file systems' listings tell when a file was written; a local one's `created` is another time."""


class CheckpointsError(RuntimeError):
    """The command cannot do what it was asked to; the message names the argument and what to do."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A commit record under the URL. When it cannot be read, `problem` says why, and only `step` and pins are known."""

    step: int
    problem: str = ""
    generation: int = 0
    mesh: dict[str, int]
    ranks: int = 0
    n_bytes: int = 0
    age_s: float | None = None
    """Since the record was created, by the store's clock; None when the store does not tell."""
    trust: str = ""
    """Empty when the record cannot be read."""
    pinned: str | None = None
    """Why it is pinned."""


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """A folder of data that no commit record names: of a save under way, or of one that was cut off."""

    folder: str
    step: int
    n_bytes: int
    age_s: float | None
    """Since its newest file was written; None when there is none, or the store does not tell."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    rows: tuple[Row, ...]
    leftovers: tuple[Leftover, ...]

    def document(self) -> dict[str, Any]:
        return {
            "checkpoints": [asdict(row) for row in self.rows],
            "leftovers": [asdict(leftover) for leftover in self.leftovers],
        }


@contextmanager
def store_errors(url: str, option: str = "") -> Iterator[None]:
    """Turn a store's own exceptions into one line that names the URL, and the option that gave it."""
    where = f"{option} {url}".strip()
    try:
        yield
    except (CheckpointsError, FormatError, identity.RecordError, ManifestError, AssertionError):
        raise
    except StoreError as e:
        raise CheckpointsError(f"{where}: {str(e).removeprefix(f'{url}: ')}") from e
    except Exception as e:  # a driver that is not installed, credentials that are missing: every store has its own
        raise CheckpointsError(f"{where}: {type(e).__name__}: {' '.join(str(e).split())}") from e


def check_protocol(url: str) -> None:
    """Raises CheckpointsError when there is no file system for a URL."""
    try:
        urls.check_protocol(url)
    except StoreError as e:
        raise CheckpointsError(f"{url}: {e}") from e


# --- looking ---------------------------------------------------------------------------------------------------------


def split_step(location: str) -> tuple[str, int | None]:
    """URL and step of URL@STEP."""
    match = re.fullmatch(r"(.+)@(\d+)", location)
    return (match.group(1), int(match.group(2))) if match else (location, None)


def committed_steps(url: str) -> list[int]:
    """Steps of all commit records under `url`, ascending.

    Raises:
        CheckpointsError: it is no URL that can be read, or there is nothing of a run under it.
    """
    check_protocol(url)
    with store_errors(url):
        steps = commits.list_commits(url)
        known = bool(steps) or journal.exists(url) or bool(list_folders(url, DATA_DIR))
    if not known:
        raise CheckpointsError(f"{url}: there is no run and no checkpoint; name a run directory (run.url)")
    return steps


def find_commit(url: str, step: int | None) -> Commit:
    """The commit record of `step`, or of the newest one.

    Raises:
        CheckpointsError: there is none, or it cannot be read.
    """
    steps = committed_steps(url)
    if not steps:
        raise CheckpointsError(f"{url}: no checkpoint is committed; `shepherd checkpoints ls` shows what lies there")
    if step is None:
        step = steps[-1]
    elif step not in steps:
        raise CheckpointsError(f"{url}: no checkpoint of step {step} is committed; there are {enumerated(steps)}")
    try:
        with store_errors(url):
            return commits.read_commit(url, step)
    except ManifestError as e:
        raise CheckpointsError(f"{url}: {commit_name(step)}: {e}; name another step") from e


def listing(url: str) -> Listing:
    """What is committed under `url`, and what lies there uncommitted."""
    steps = committed_steps(url)
    with store_errors(url):
        store, said, kept = locate(url), statements.read(url), pins.pinned(url)
        rows, named = [], set[str]()
        unreadable = set[int]()
        for step in steps:
            pin = pins.why_pinned(url, step) if step in kept else None
            try:
                commit = commits.read_commit(url, step)
            except FileNotFoundError:
                continue  # it is being deleted
            except ManifestError as e:
                rows.append(Row(step=step, problem=str(e), mesh={}, pinned=pin))
                unreadable.add(step)
                continue
            named |= {part.data.rpartition("/")[0] for part in commit.parts}
            about = [s for s in said.get(step, ()) if s.generation in (0, commit.generation)]
            rows.append(
                Row(
                    step=step,
                    generation=commit.generation,
                    mesh=commit.mesh,
                    ranks=len(commit.parts),
                    n_bytes=sum(part.data_bytes for part in commit.parts),
                    age_s=_age_s(store, store.path(commit_name(step))),
                    trust=about[-1].trust if about else "committed",
                    pinned=pin,
                )
            )
        return Listing(rows=tuple(rows), leftovers=tuple(_leftovers(url, store, named, unreadable)))


def _leftovers(url: str, store: Store, named: set[str], unreadable: set[int]) -> Iterator[Leftover]:
    for name in list_folders(url, DATA_DIR):
        match = _FOLDER.fullmatch(name)
        folder = f"{DATA_DIR}/{name}"
        # A record that cannot be read may name the folder: people want to look at both.
        if match and folder not in named and int(match.group(1)) not in unreadable:
            files = store.fs.find(store.path(folder), detail=True)
            ages = [age for path, entry in files.items() if (age := _age_s(store, path, entry)) is not None]
            yield Leftover(
                folder=folder,
                step=int(match.group(1)),
                n_bytes=sum(int(file["size"] or 0) for file in files.values()),
                age_s=min(ages, default=None),
            )


def _age_s(store: Store, path: str, entry: Mapping[str, Any] | None = None) -> float | None:
    """Since a file was written: as its entry in a listing tells, so that no request for each file is needed."""
    told = (entry[key] for key in _WRITTEN if isinstance(entry.get(key), (datetime, int, float))) if entry else ()
    try:
        written = next(iter(told), None)
        if written is None:
            written = store.fs.modified(path)
        return max(0.0, time.time() - (written.timestamp() if isinstance(written, datetime) else float(written)))
    except Exception:  # not every store knows, and each says so in its own way
        return None


def show_listing(listing: Listing, console: Console) -> None:
    if listing.rows:
        table = Table("step", "gen.", "mesh", "ranks", "size", "age", "trust", "pinned", box=None, pad_edge=False)
        for row in listing.rows:
            if row.problem:
                cells = (str(row.step), "", f"unreadable: {redacted(row.problem)}", "", "", "", "", row.pinned or "")
            else:
                cells = (
                    str(row.step),
                    str(row.generation),
                    mesh_words(row.mesh),
                    str(row.ranks),
                    size(row.n_bytes),
                    _age_words(row.age_s),
                    row.trust,
                    "" if row.pinned is None else redacted(row.pinned) or "yes",
                )
            table.add_row(*(_plain(cell) for cell in cells))
        console.print(table)
    else:
        console.print("no checkpoint is committed")
    for left in listing.leftovers:
        words = f"uncommitted: {left.folder}, {size(left.n_bytes)}, last written {_age_words(left.age_s)} ago"
        console.print(words, markup=False)


def mesh_words(mesh: dict[str, int]) -> str:
    """``pp=2 tp=4``: the degrees above one."""
    if not mesh:
        return "imported"
    return " ".join(f"{dim}={degree}" for dim, degree in mesh.items() if degree > 1) or "one rank"


def _age_words(age_s: float | None) -> str:
    return "unknown" if age_s is None else duration(int(age_s * 1e6))


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def enumerated(steps: Sequence[int]) -> str:
    shown = ", ".join(str(step) for step in steps[-8:])
    return f"{len(steps)}, the newest {shown}" if len(steps) > 8 else shown or "none"


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes that are done since the last call; a bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda n_bytes: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n_bytes: progress.advance(task, n_bytes)


# --- verify ----------------------------------------------------------------------------------------------------------


def verify(url: str, step: int | None, every: bool) -> dict[int, list[str]]:
    """What is wrong with each checkpoint asked for, by step: with one, the newest, or all of them."""
    if every and step is not None:
        raise CheckpointsError(f"--all: verifies every step; leave out {step}, or --all")
    steps = committed_steps(url) if every else [find_commit(url, step).step]
    if not steps:
        raise CheckpointsError(f"{url}: no checkpoint is committed; `shepherd checkpoints ls` shows what lies there")
    return {step: _verify(url, step) for step in steps}


def _verify(url: str, step: int) -> list[str]:
    with store_errors(url):
        try:
            commit = commits.read_commit(url, step)
        except ManifestError as e:
            return [f"{commit_name(step)}: {e}"]
        with progress_bar(f"step {step}", sum(part.data_bytes for part in commit.parts)) as progress:
            return commits.verify(url, commit, progress)
