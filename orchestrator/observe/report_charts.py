"""A report's charts, as Plotly figures. Colours of text and grid come from the page, in light and in dark."""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from orchestrator.chaos.scorecard import Score
from orchestrator.core.goodput import LABELS, Label
from orchestrator.core.state import IN_QUARANTINE
from orchestrator.observe.report_fold import History, Span
from orchestrator.observe.report_words import SOURCES, duration, headline
from storage.redact import redacted

LABEL_COLOURS: dict[Label, str] = {
    "productive": "#0072B2",
    "recomputed": "#56B4E9",
    "detection": "#D55E00",
    "recovery": "#E69F00",
    "provisioning": "#8FD3BF",
    "start_up": "#009E73",
    "data_wait": "#F0E442",
    "checkpoint_stall": "#8C6BB1",
    "validation": "#999933",
    "straggling": "#117733",
    "waiting_for_nodes": "#CC79A7",
    "idle_spare": "#B5B5B5",
    "degraded_capacity": "#6E6E6E",
    "paused": "#DADADA",
    "other": "#882255",
}
"""After Okabe and Ito (2008) and Tol's muted scheme, which people with colour blindness can tell apart."""

NODE_COLOURS = {
    "active": "#0072B2",
    "spare": "#B5B5B5",
    "quarantined": "#CC79A7",
    "probed": "#8FD3BF",
    "lost": "#6E6E6E",
}
MESH_COLOURS = {
    "training": "#0072B2",
    "waiting": "#CC79A7",
    "starting": "#009E73",
    "halting": "#D55E00",
    "recovering": "#E69F00",
    "committing": "#8C6BB1",
}

LANES_SHOWN = 48
"""Nodes with a lane of their own; a page with more is not read. Those that something happened to come first."""
MARKS_SHOWN = 2_000
"""Of one kind in the timeline, the newest: what a browser draws at once."""
POINTS_SHOWN = 10_000
"""Of the loss curve; a longer one shows the smallest and the largest of each stretch."""
BINS = 240
"""Stretches of time: about as many as a laptop's chart has room for."""

_TEXT_LENGTH = 300
_MARK_ROWS = ("incidents", "faults", "checkpoints", "controller")
_MARK_STYLES = {
    "incidents": ("triangle-down", "#D55E00"),
    "faults": ("x", "#882255"),
    "checkpoints": ("diamond", "#009E73"),
    "controller": ("circle", "#56B4E9"),
}


def goodput_chart(history: History) -> go.Figure:
    """What the nodes were doing over time: the area of a colour is the label's node-seconds."""
    unit, scale = _time_unit(history)
    bins = _Bins(history)
    shares: dict[Label, list[float]] = {}
    for spent in history.spent:
        if spent.label != "paused":
            bins.spread(shares.setdefault(spent.label, [0.0] * bins.n), spent.start, spent.end, spent.node_us)
    figure = go.Figure()
    for label in LABELS:
        if label in shares:
            figure.add_bar(
                x=[x / scale for x in bins.middles],
                y=[node_us / bins.width for node_us in shares[label]],
                width=bins.width / scale,
                name=label,
                marker={"color": LABEL_COLOURS[label], "line": {"width": 0}},
                hovertemplate=f"{label}: %{{y:.2f}} nodes<extra></extra>",
            )
    _lay_out(figure, f"run time ({unit})", "nodes", 320)
    figure.update_layout(barmode="stack", bargap=0, hovermode="x unified")
    return figure


def timeline_chart(history: History, scores: Sequence[Score]) -> go.Figure:
    """A lane for the mesh, one for each node, and above them what happened."""
    unit, scale = _time_unit(history)
    names = _lanes(history)
    rows = {name: len(_MARK_ROWS) + 1 + i for i, name in enumerate(names)}
    figure = go.Figure()
    mesh_row = len(_MARK_ROWS)
    for doing, colour in MESH_COLOURS.items():
        spans = [span for span in history.mesh_spans if span.doing == doing]
        _bars(figure, history, spans, [mesh_row] * len(spans), f"mesh {doing}", colour, scale)
    for doing, colour in NODE_COLOURS.items():
        spans = [span for span in history.node_spans if span.doing == doing and span.lane in rows]
        _bars(figure, history, spans, [rows[span.lane] for span in spans], f"node {doing}", colour, scale)
    for kind, marks in _marks(history, scores).items():
        symbol, colour = _MARK_STYLES[kind]
        shown = marks[-MARKS_SHOWN:]
        figure.add_scatter(
            x=[history.clock(at) / scale for at, _ in shown],
            y=[_MARK_ROWS.index(kind)] * len(shown),
            mode="markers",
            name=kind,
            showlegend=False,
            marker={"symbol": symbol, "size": 10, "color": colour},
            hovertext=[text for _, text in shown],
            hoverinfo="text",
        )
    ticks = [*_MARK_ROWS, "mesh", *(_text(name, 18) for name in names)]
    _lay_out(figure, f"run time ({unit})", "", 150 + 24 * len(ticks))
    figure.update_layout(
        barmode="overlay",
        bargap=0.25,
        hovermode="closest",
        uniformtext={"mode": "hide", "minsize": 9},
    )
    figure.update_yaxes(
        tickvals=list(range(len(ticks))),
        ticktext=ticks,
        range=[len(ticks) - 0.4, -0.6],
        showgrid=False,
        fixedrange=True,
    )
    return figure


def loss_chart(
    history: History, loss: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]]
) -> go.Figure:
    """Nats per token over steps; a vertical line where an incident struck."""
    figure = go.Figure()
    shown = _thinned(loss)
    figure.add_scatter(
        x=[step for step, _ in shown],
        y=[value for _, value in shown],
        mode="lines" if len(shown) > 1 else "markers",
        name="training",
        line={"color": "#2E91D0", "width": 1.8},
        hovertemplate="step %{x}: %{y:.4f}<extra>training</extra>",
    )
    if validation:
        figure.add_scatter(
            x=[step for step, _ in validation],
            y=[value for _, value in validation],
            mode="markers",
            name="validation",
            marker={"symbol": "diamond", "size": 9, "color": "#009E73"},
            hovertemplate="step %{x}: %{y:.4f}<extra>validation</extra>",
        )
    incidents = [story.incident for story in history.stories][-MARKS_SHOWN:]
    if incidents and loss:
        top = max(value for _, value in [*loss, *validation])
        bottom = min(value for _, value in [*loss, *validation])
        line = {"color": "#D55E00", "width": 1, "dash": "dot"}
        steps = dict.fromkeys(incident.step for incident in incidents)
        figure.update_layout(
            shapes=[
                {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "y domain", "line": line} for x in steps
            ]
        )
        figure.add_scatter(
            x=[incident.step for incident in incidents],
            y=[top + 0.03 * (top - bottom)] * len(incidents),
            mode="markers",
            name="incident",
            marker={"symbol": "triangle-down", "size": 10, "color": "#D55E00"},
            hovertext=[_text(f"Incident {i.number}: {headline(i)}") for i in incidents],
            hoverinfo="text",
        )
    _lay_out(figure, "step", "loss (nats per token)", 340)
    return figure


def throughput_chart(history: History) -> go.Figure:
    """Tokens a second over time, apart for steps that were done for the first time and again."""
    unit, scale = _time_unit(history)
    bins = _Bins(history)
    new, redone = [0.0] * bins.n, [0.0] * bins.n
    for work in history.work:
        bins.spread(new, work.start, work.end, work.tokens - work.redone)
        bins.spread(redone, work.start, work.end, work.redone)
    figure = go.Figure()
    for name, tokens, label in (("first execution", new, "productive"), ("done again", redone, "recomputed")):
        if any(tokens):
            figure.add_bar(
                x=[x / scale for x in bins.middles],
                y=[n / bins.width * 1e6 for n in tokens],
                width=bins.width / scale,
                name=name,
                marker={"color": LABEL_COLOURS[label], "line": {"width": 0}},  # type: ignore[index]
                hovertemplate=f"{name}: %{{y:,.0f}} tokens/s<extra></extra>",
            )
    _lay_out(figure, f"run time ({unit})", "tokens per second", 260)
    figure.update_layout(barmode="stack", bargap=0, hovermode="x unified")
    return figure


class _Bins:
    """Equal stretches of the run's time without its pauses."""

    def __init__(self, history: History) -> None:
        self._clock = history.clock
        self.n = BINS
        self.width = max(1.0, history.active_us / BINS)
        """Microseconds."""
        self.middles = [(i + 0.5) * self.width for i in range(self.n)]

    def spread(self, values: list[float], start: int, end: int, amount: float) -> None:
        """Add `amount`, which came about evenly between the two times."""
        a, b = self._clock(start) / self.width, self._clock(end) / self.width
        first, last = min(int(a), self.n - 1), min(int(b), self.n - 1)
        for i in range(first, last + 1):
            share = (min(b, i + 1) - max(a, i)) / (b - a) if b > a else 1.0
            values[i] += amount * share


def _bars(
    figure: go.Figure,
    history: History,
    spans: Sequence[Span],
    rows: Sequence[int],
    name: str,
    colour: str,
    scale: float,
) -> None:
    if not spans:
        return
    starts = [history.clock(span.start) for span in spans]
    ends = [history.clock(span.end) for span in spans]
    figure.add_bar(
        orientation="h",
        base=[start / scale for start in starts],
        x=[(end - start) / scale for start, end in zip(starts, ends, strict=True)],
        y=rows,
        name=name,
        width=0.72,
        marker={
            "color": colour,
            "line": {"width": 0.5, "color": "rgba(255,255,255,0.6)"},
            "pattern": {"shape": "/", "fgcolor": colour, "bgcolor": "rgba(0,0,0,0)", "solidity": 0.2, "size": 6}
            if name == "node lost"
            else None,
        },
        text=[f"g{span.generation}" if span.generation and span.doing == "active" else "" for span in spans],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        insidetextfont={"color": "white", "size": 10},
        hovertext=[_span_text(history, span, name) for span in spans],
        hoverinfo="text",
    )


def _span_text(history: History, span: Span, name: str) -> str:
    start, end = history.clock(span.start), history.clock(span.end)
    lines = [f"{name} {span.lane}" if span.lane else name]
    lines.append(f"{duration(start)} to {duration(end)}: {duration(end - start)}")
    if span.generation:
        generation = history.generations[span.generation - 1]
        lines.append(
            f"generation {span.generation}, opened at step {generation.order.step} from "
            f"{SOURCES[generation.order.source]}: {generation.order.reason}"
        )
    if span.doing == "lost":
        lines += [mark.text for node, mark in history.departures if node == span.lane][-1:]
    return "<br>".join(_text(line) for line in lines)


def _marks(history: History, scores: Sequence[Score]) -> dict[str, list[tuple[int, str]]]:
    """Row to time and hover text."""
    incidents = [
        (s.incident.detected_at, _text(f"Incident {s.incident.number}: {headline(s.incident)}"))
        for s in history.stories
    ]
    faults = [(round(score.at_s * 1e6), _text(f"Injected {score.fault}: {score.truth}")) for score in scores]
    checkpoints = [
        (row.committed_at, f"Checkpoint of step {row.step:,} committed")
        for row in history.checkpoints.rows
        if row.committed_at is not None
    ]
    checkpoints += [(f.at, _text(f"Save of step {f.step:,} failed: {f.error}")) for f in history.checkpoints.failures]
    controllers = [
        (e.at, _text(f"Epoch {e.epoch} begins, version {e.version}" + (": the controller came back" if back else "")))
        for e, back in history.epochs
    ]
    controllers += [(mark.at, _text(mark.text)) for mark in history.stops]
    rows = (incidents, faults, sorted(checkpoints), sorted(controllers))
    return {kind: marks for kind, marks in zip(_MARK_ROWS, rows, strict=True) if marks}


def _lanes(history: History) -> list[str]:
    """The nodes that have a lane, in the order of joining; those that changed most often when there are too many."""
    bars: dict[str, int] = {}
    for span in sorted(history.node_spans, key=lambda span: span.start):
        bars[span.lane] = bars.get(span.lane, 0) + 1 + 1000 * (span.doing in ("lost", *IN_QUARANTINE))
    kept = set(sorted(bars, key=lambda name: -bars[name])[:LANES_SHOWN])
    return [name for name in bars if name in kept]


def hidden_lanes(history: History) -> int:
    """Nodes that the timeline has no lane for."""
    return max(0, len({span.lane for span in history.node_spans}) - LANES_SHOWN)


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    if len(points) <= POINTS_SHOWN:
        return list(points)
    length = -(-len(points) // (POINTS_SHOWN // 2))
    kept: list[tuple[int, float]] = []
    for i in range(0, len(points), length):
        stretch = points[i : i + length]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def _time_unit(history: History) -> tuple[str, float]:
    """The axis' unit, and its microseconds."""
    for unit, seconds, from_s in (("days", 86_400, 345_600), ("hours", 3600, 14_400), ("minutes", 60, 600)):
        if history.active_us >= from_s * 1e6:
            return unit, seconds * 1e6
    return "seconds", 1e6


def _lay_out(figure: go.Figure, x: str, y: str, height: int) -> None:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(title_text=x, automargin=True, zeroline=False, showline=True, ticks="outside")
    figure.update_yaxes(title_text=y, automargin=True, zeroline=False)


def _text(text: str, length: int = _TEXT_LENGTH) -> str:
    """For Plotly, which reads a part of HTML: on one line, cut off, without secrets, and every character as it is."""
    text = redacted(" ".join(text.split()))
    return html.escape(text if len(text) <= length else text[: length - 1] + "…")
