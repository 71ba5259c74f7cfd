"""`shepherd report`: one self-contained HTML page about a run, made from its journal alone."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from orchestrator.chaos.scorecard import Score, score
from orchestrator.core import events as ev
from orchestrator.core.goodput import LABELS
from orchestrator.core.state import EXIT_OK, EXIT_STOPPED, NODE_STATES, USABLE
from orchestrator.observe import report_charts as charts
from orchestrator.observe import report_words as words
from orchestrator.observe.report_checkpoints import FATES
from orchestrator.observe.report_curves import curves
from orchestrator.observe.report_fold import PHASES, History, fold
from orchestrator.runtime import driver, journal
from storage.redact import redacted
from storage.urls import read_bytes

EVIDENCE_SHOWN = 16
"""Of one incident; a mesh's other ranks all say the same."""
ROWS_SHOWN = 200
"""Of a table of generations, nodes or checkpoints, the newest: what is read, and prints."""

PHASE_COLOURS = {
    "detection": "#D55E00",
    "teardown": "#882255",
    "waiting": "#CC79A7",
    "restart": "#E69F00",
    "restore": "#009E73",
    "first_step": "#56B4E9",
}


class ReportError(RuntimeError):
    """There is nothing to report on, or it cannot be read or written."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A figure of goodput, never without its definition."""

    name: str
    value: float | None
    """None when nothing has been settled yet."""
    definition: str


def locate(run: str, log_dir: str, address: str | None) -> str:
    """The run directory that `run` names: itself, or run.url of the active run of that name on a Ray cluster.

    Raises:
        ReportError: it is neither.
        PermissionError: the token under `log_dir` is not the run's.
    """
    if "/" in run or Path(run).is_dir():
        return run
    try:
        driver.connect(address)
        return driver.where(driver.find(run), driver.read_token(log_dir, run))
    except driver.RunError as e:
        raise ReportError(f"{run}: there is no such folder here; as the name of an active run: {e}") from e


def write_report(url: str, path: Path, log_dir: str | None = None) -> None:
    """Write the report on the run under `url` to `path`.

    Args:
        url: the run directory, a path or an fsspec URL.
        path: of the page; folders that it lacks are made.
        log_dir: cluster.log_dir of the run, where an active run's controller on this machine keeps the records that are
            not under `url` yet.

    Raises:
        ReportError: there is no journal, this version cannot read it, or the page cannot be written.
    """
    try:
        records, began_unix_us = _read(url, log_dir), _began_unix_us(url)
    except Exception as e:  # every store has its own: botocore's NoCredentialsError is no OSError
        raise _refusal(url, e) from e
    try:
        page = render(records, began_unix_us)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page)
    except (ReportError, journal.JournalError, OSError) as e:
        raise _refusal(url, e) from e


def _refusal(url: str, error: Exception) -> ReportError:
    message = str(error) if url in str(error) else f"{url}: {error}"
    return ReportError(redacted(" ".join(message.split())))


def render(records: list[journal.Record], began_unix_us: int | None = None) -> str:
    """The page.

    Raises:
        ReportError: the records do not tell of a run.
        journal.ReplayMismatch: this version decides differently from the one that wrote them.
    """
    history = fold(records)
    if not history.declared:
        raise ReportError("its journal does not say which run it is of")
    scores = score(records) if history.state.faults else []
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: redacted(value) if type(value) is str else value,
    )
    environment.filters |= {"duration": words.duration, "us": lambda us: f"{us:,}", "s": lambda us: f"{us / 1e6:,.3f}"}
    source = resources.files("orchestrator.observe").joinpath("report.html").read_text()
    return environment.from_string(source).render(_view(history, records, scores, began_unix_us))


def _read(url: str, log_dir: str | None) -> list[journal.Record]:
    if not journal.exists(url):
        raise ReportError("there is no run: no controller has ever begun under it")
    records = journal.read(url)
    if not records:
        raise ReportError("the run's journal is empty: a controller began, and no record of it is on the store")
    names = [record.event.run for record in records if isinstance(record.event, ev.RunDeclared)]
    folder = Path(log_dir).expanduser() / names[0] if log_dir and names else None
    for tail in sorted(folder.glob("journal-tail-*.jsonl")) if folder is not None else []:
        longer = journal.read(url, tail)  # another run's tail does not follow this one's segments
        records = longer if len(longer) > len(records) else records
    return records


def _began_unix_us(url: str) -> int | None:
    """Wall-clock time of the run's microsecond 0, as the first controller's claim has it."""
    try:
        return int(json.loads(read_bytes(url, "epochs/00000001.json"))["began_unix_us"])
    except (FileNotFoundError, KeyError, TypeError):
        return None


def _view(
    history: History, records: list[journal.Record], scores: list[Score], began_unix_us: int | None
) -> dict[str, Any]:
    """What the template shows."""
    loss, validation = curves(records)
    figures = {"goodput": charts.goodput_chart(history), "timeline": charts.timeline_chart(history, scores)}
    if loss:
        figures["loss"] = charts.loss_chart(history, loss, validation)
    if any(work.tokens for work in history.work):
        figures["throughput"] = charts.throughput_chart(history)
    state = history.state
    return {
        "h": history,
        "s": state,
        "words": words,
        "verdict": words.verdict(history),
        "mood": {None: "running", EXIT_OK: "good", EXIT_STOPPED: "stopped"}.get(state.exit_code, "failed"),
        "ratios": ratios(history),
        "ledger": [
            {"label": label, "us": us, "definition": LABELS[label], "colour": charts.LABEL_COLOURS[label]}
            for label, us in state.ledger.totals.items()
        ],
        "parts": _parts(history),
        "figures": {name: Markup(figure.to_json()) for name, figure in figures.items()},
        "hidden_lanes": charts.hidden_lanes(history),
        "phases": {"detection": "the step in flight, and until the failure was noticed", **PHASES},
        "phase_colours": PHASE_COLOURS,
        "evidence_shown": EVIDENCE_SHOWN,
        "rows_shown": ROWS_SHOWN,
        "scores": scores,
        "fates": FATES,
        "usable": USABLE,
        "node_states": NODE_STATES,
        "began": _date(began_unix_us),
        "data": _redacted(document(history, scores)),
        "plotly": Markup(get_plotlyjs()),
    }


def ratios(history: History) -> list[Ratio]:
    """Productive time over what it is measured by, with and without what one may leave out."""
    totals = history.state.ledger.totals
    settled, productive = sum(totals.values()), totals["productive"]
    without_spares = settled - totals["idle_spare"]
    figures = [
        ("goodput", productive, settled, "productive time over all node time; spares, start-up and pauses count"),
        ("goodput without spares", productive, without_spares, "the same, but idle spares are not counted"),
    ]
    if totals["paused"]:
        figures.append(
            (
                "goodput without spares and pauses",
                productive,
                without_spares - totals["paused"],
                "the same, but neither idle spares nor the time between an end and a resume are counted",
            )
        )
    figures.append(
        (
            "effective training time",
            history.productive_wall_us,
            history.active_us,
            "wall-clock in which the mesh executed steps for the first time, over all wall-clock but pauses "
            "(ETTR, after Kokolis et al. 2024)",
        )
    )
    return [Ratio(name=n, value=part / all_ if all_ else None, definition=d) for n, part, all_, d in figures]


def _parts(history: History) -> list[tuple[int, int]]:
    """Wall-clock and places of each declaration: what the ledger must add up to."""
    ends = [*(d.at for d in history.declared[1:]), history.state.ledger.mark]
    return [
        (end - declared.at, declared.layout.nodes + declared.layout.spares)
        for declared, end in zip(history.declared, ends, strict=True)
    ]


def document(history: History, scores: list[Score]) -> dict[str, Any]:
    """The page's numbers, for programs: whole microseconds, and node-microseconds where `cost` or `ledger` says so."""
    state = history.state
    return {
        "run": state.run,
        "exit_code": state.exit_code,
        "job": state.job,
        "wall_clock_us": history.wall_clock_us,
        "parts": [{"wall_clock_us": span, "places": places} for span, places in _parts(history)],
        "ledger_us": dict(state.ledger.totals),
        "pending_us": state.ledger.pending_us,
        "owed_us": state.ledger.owed,
        "ratios": {ratio.name: ratio.value for ratio in ratios(history)},
        "steps": {
            "done": state.high_water,
            "total": None if state.is_open_ended else state.total_steps,
            "redone": history.steps_redone,
        },
        "incidents": [
            {
                "number": story.incident.number,
                "detected_at_us": story.incident.detected_at,
                "cause": story.incident.cause,
                "culprit": story.incident.culprit,
                "step": story.incident.step,
                "rungs": story.incident.rungs,
                "phases_us": {"detection": story.detection_us, **story.phases_us},
                "cost_us": story.cost_us,
                "steps_lost": story.incident.steps_lost,
                "closed_at_us": story.incident.closed_at,
            }
            for story in history.stories
        ],
        "faults": [score.document() for score in scores],
        "checkpoints": [dataclasses.asdict(row) for row in history.checkpoints.rows],
        "intervals": [dataclasses.asdict(choice) for choice in history.checkpoints.intervals],
        "saves_failed": state.saves_failed,
    }


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redacted(value) if isinstance(value, str) else value


def _date(unix_us: int | None) -> str:
    return "" if unix_us is None else datetime.fromtimestamp(unix_us / 1e6, UTC).strftime("%-d %B %Y, %H:%M:%S UTC")
