"""The page of a run: its numbers are the ledger's, every incident is in it, and nothing in a journal can break it."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from report_pages import SECOND, hostile, long_run, page_of, records_of, trace

from orchestrator.core import events as ev
from orchestrator.core import recovery, state
from orchestrator.core.goodput import LABELS
from orchestrator.core.state import JOB_STATES
from orchestrator.observe import report_charts, report_words
from orchestrator.observe.report import ReportError, render
from orchestrator.observe.report_fold import PHASES, fold
from orchestrator.runtime import journal
from orchestrator.runtime.journal import Record

EVIL = """<script>alert(1)</script><img src=x onerror=alert(2)> "'&amp; {{ 7 * 7 }} </script> %{x}"""


# --- the page ---


@pytest.mark.parametrize("seed", [3, 11])
def test_the_numbers_of_the_page_are_the_ledgers(seed: int) -> None:
    records = hostile(seed)
    ledger = journal.replay(records).state.ledger
    page = page_of(records)
    data = page.json("report-data")
    assert data["ledger_us"] == ledger.totals
    assert (data["pending_us"], data["owed_us"]) == (ledger.pending_us, ledger.owed)
    assert sum(part["wall_clock_us"] * part["places"] for part in data["parts"]) == ledger.owed
    assert sum(part["wall_clock_us"] for part in data["parts"]) == data["wall_clock_us"]

    cells = [(int(str(a["data-us"])), text) for a, text in page.find("td", "ledger") if "data-us" in a]
    pending = [ledger.pending_us] if ledger.pending_us else []
    assert [us for us, _ in cells] == [*ledger.totals.values(), *pending, ledger.owed]
    assert all(text == f"{us / 1e6:,.3f}" for us, text in cells)
    assert sum(us for us, _ in cells[:-1]) == cells[-1][0]
    definitions = [text for a, text in page.find("td", "ledger") if a.get("class") == "text"]
    assert definitions[: len(LABELS)] == list(LABELS.values())
    assert f"= {ledger.owed:,} µs." in page.text("sum")

    productive, settled = ledger.totals["productive"], sum(ledger.totals.values())
    assert data["ratios"]["goodput"] == productive / settled
    assert data["ratios"]["goodput without spares"] == productive / (settled - ledger.totals["idle_spare"])
    assert f"Goodput {productive / settled:.1%}" in page.text("verdict")
    shown = {text for _, text in page.find("td", "ratios")}
    assert f"{100 * productive / settled:.2f} %" in shown


def test_the_chart_of_labels_has_the_ledgers_node_seconds() -> None:
    records = hostile(3)
    totals = journal.replay(records).state.ledger.totals
    figure = page_of(records).json("figure-goodput")
    drawn = {bar["name"]: sum(bar["y"]) * bar["width"] * 1e6 for bar in figure["data"]}
    assert drawn == pytest.approx({label: us for label, us in totals.items() if us and label != "paused"})
    places = max(part["places"] for part in page_of(records).json("report-data")["parts"])
    heights = [sum(column) for column in zip(*(bar["y"] for bar in figure["data"]), strict=True)]
    assert max(heights) <= places * 1.001


@pytest.mark.parametrize("seed", [1, 4])
def test_every_incident_is_told(seed: int) -> None:
    records = hostile(seed, 900)
    incidents = journal.replay(records).state.incidents
    page = page_of(records)
    assert len(incidents) > 2 and any(story.processes for story in incidents)
    articles = [a["id"] for a, _ in page.find("article")]
    assert articles == [f"incident-{i.number}" for i in incidents]
    for story, told in zip(incidents, page.json("report-data")["incidents"], strict=True):
        text = page.text(f"incident-{story.number}")
        assert f"generation {story.generation} after step {story.step:,}" in text
        assert report_words.node_time(story.cost_us) in text and story.reason in text
        for evidence in [*story.evidence, *story.answered][:8]:
            assert evidence.detail in text and f"({evidence.kind}; " in text
        assert all(f"“{rung}”" in text for rung in story.rungs)
        assert all(f"({slots} {process})" in text for process, slots in story.processes.items())
        assert (told["cause"], told["cost_us"], told["rungs"]) == (story.cause, story.cost_us, story.rungs)
        assert set(told["phases_us"]) == {"detection", *PHASES}
        spans = page.find("span", f"incident-{story.number}")
        shown = [int(str(a["data-us"])) for a, _ in spans if "data-us" in a]
        assert sum(shown) == sum(told["phases_us"].values())


def test_stragglers_are_told() -> None:
    slow = [r.event for r in trace("slow_node") if isinstance(r.event, ev.NodeSlow)]
    text = page_of(trace("slow_node")).text("stragglers")
    assert slow and all(f"node {event.node}: {event.detail}" in text for event in slow)


def test_the_timeline_has_nodes_generations_and_marks() -> None:
    records = hostile(11)
    history = fold(records)
    figure = page_of(records).json("figure-timeline")
    ticks = figure["layout"]["yaxis"]["ticktext"]
    assert set(ticks[5:]) == {bar.lane for bar in history.node_spans}
    bars = [bar for bar in figure["data"] if bar["type"] == "bar"]
    assert sum(len(bar["x"]) for bar in bars) == len(history.node_spans) + len(history.mesh_spans)
    texts = {text for bar in bars for text in bar["text"] if text}
    assert texts <= {f"g{g.order.generation}" for g in history.generations} and texts
    marks = {m["name"]: m for m in figure["data"] if m["type"] == "scatter"}
    assert len(marks["incidents"]["x"]) == len(history.stories)
    assert len(marks["controller"]["x"]) == len(history.epochs) + len(history.stops)
    committed = [row for row in history.checkpoints.rows if row.committed_at is not None]
    assert len(marks["checkpoints"]["x"]) == len(committed) + len(history.checkpoints.failures)


def test_of_a_large_mesh_the_nodes_to_which_something_happened_have_lanes() -> None:
    events = long_run(3)
    many = report_charts.LANES_SHOWN + 20
    declared = events[0]
    assert isinstance(declared, ev.RunDeclared)
    wide = dataclasses.replace(declared.layout, spares=many)
    events[0] = dataclasses.replace(declared, layout=wide)
    names = [f"spare{i}" for i in range(many)]
    joined: list[ev.Event] = [ev.NodeJoined(at=3 * SECOND, node=n, domain="", snapshots={}) for n in names]
    lost = ev.NodeLost(at=4 * SECOND, node=names[-1], cause="gone")
    end = ev.StopRequested(at=5 * SECOND, by="somebody", graceful=False)
    page = page_of(records_of([*events, *joined, lost, end]))
    ticks = page.json("figure-timeline")["layout"]["yaxis"]["ticktext"][5:]
    assert len(ticks) == report_charts.LANES_SHOWN
    assert names[-1] in ticks and {"a", "b"} <= set(ticks)
    assert f"{many + 3 - len(ticks)} nodes to which less happened have no lane" in page.text("timeline")


# --- the verdict ---


@pytest.mark.parametrize(
    ("name", "mood", "words"),
    [
        ("first_start", "good", ["Completed 100 of 100 steps in", "on 3 nodes.", "Nothing interrupted it"]),
        ("graceful_stop_and_resume", "good", ["Completed 50 of 50", "on 2, then 1 node (in 2 parts", "of pause not"]),
        ("no_checkpoint_yet", "running", ["Not ended yet", "it was training", "No checkpoint is committed"]),
        ("controller_restarts_while_halting", "running", ["was bringing a generation up", "1 interruption cost"]),
        ("nobody_comes", "failed", ["Failed with 40 of 1,000", "Exit code 95 means too few usable nodes"]),
        ("same_exception_twice", "failed", ["token 70000 is out of range", "Exit code 93 means the job's own fault"]),
        ("stop_during_recovery", "stopped", ["stopped by the operator", "a resume must do 40 completed steps again"]),
        ("damaged_checkpoint", "running", ["100 completed steps had to be done again"]),
        ("worker_killed", "running", ["no completed step was lost"]),
    ],
)
def test_the_verdict(name: str, mood: str, words: list[str]) -> None:
    page = page_of(trace(name))
    ((attrs, text),) = page.find("p", id="verdict")
    assert attrs["class"] == f"verdict {mood}"
    assert [w for w in words if w not in text] == [], text


def test_the_verdict_of_a_crash_loop() -> None:
    events = [record.event for record in trace("crash_loop")]
    page = page_of(records_of(events))
    assert page.json("report-data")["exit_code"] == 94
    assert "Exit code 94 means a crash loop" in page.text("verdict")


def test_every_end_and_state_has_its_words() -> None:
    codes = {value for name, value in vars(state).items() if name.startswith("EXIT_")}
    assert set(report_words.EXIT_MEANINGS) == codes
    assert {*report_words._DOING, "ended"} == set(JOB_STATES)
    assert set(report_charts.LABEL_COLOURS) == set(LABELS)
    assert len(set(report_charts.LABEL_COLOURS.values())) == len(LABELS)
    for kind in recovery._ROOTS:
        evidence = state.Evidence(at=0, node="n", slot=1, kind=kind, detail="why", step=3)
        assert not report_words.what_happened(evidence).startswith(f"{kind} on"), kind


@pytest.mark.parametrize(
    ("us", "words"),
    [
        (0, "0.00 s"),
        (9_990_000, "9.99 s"),
        (10_000_000, "10.0 s"),
        (119_940_000, "119.9 s"),
        (119_960_000, "2 min 0 s"),
        (3_599_600_000, "60 min 0 s"),
        (7_200_000_000, "2 h 0 min"),
        (176_400_000_000, "2 d 1 h"),
    ],
)
def test_durations(us: int, words: str) -> None:
    assert report_words.duration(us) == words


def test_lists() -> None:
    assert report_words.listed([]) == ""
    assert report_words.listed(["a"]) == "a"
    assert report_words.listed(["a", "b", "c"]) == "a, b and c"
    assert report_words.listed(["a", "b", "c"], limit=1) == "a and 2 more"


# --- chaos ---


def chaos_run() -> list[Record]:
    """A flip that is found, and a SIGSTOP that is ordered and never told of."""
    events = long_run(4)
    at = events[-1].at
    asked = {"node": "", "parameters": {}, "by": "chaos of Ann"}
    events.append(ev.FaultRequested(at=at + 1, fault="flip", slot=1, **asked))
    events.append(ev.FaultInjected(at=at + 2, number=1, detail="bit 7 of element 5 of exp_avg/x <b>"))
    events.append(
        ev.WorkerFailed(
            at=at + SECOND, node="b", generation=1, slot=1, step=40, kind="corrupt", error="exp_avg/x changed at rest"
        )
    )
    for slot, node in enumerate(("a", "b")):
        held = {slot: (ev.Snapshot(generation=1, step=39), ev.Snapshot(generation=1, step=40))}
        events.append(ev.NodeHalted(at=at + 2 * SECOND, node=node, generation=1, snapshots=held))
    events.append(ev.FaultRequested(at=at + 3 * SECOND, fault="worker-stop", slot=0, **asked))
    return records_of(events)


def test_what_chaos_did_stands_beside_what_was_found() -> None:
    page = page_of(chaos_run())
    article = page.text("incident-1")
    assert "This was chaos." in article and "bit 7 of element 5 of exp_avg/x <b>" in article
    assert "ordered by chaos of Ann" in article and "The right node was named." in article
    assert "found its own state corrupted: exp_avg/x changed at rest" in article
    rows = [text for _, text in page.find("tr", "faults")]
    assert len(rows) == 3 and "not found" in rows[2] and "never told" in rows[2]
    assert [f["fault"] for f in page.json("report-data")["faults"]] == ["flip", "worker-stop"]
    marks = {m["name"]: m for m in page.json("figure-timeline")["data"] if m["type"] == "scatter"}
    assert len(marks["faults"]["x"]) == 2


# --- what a journal may hold ---


def evil_run() -> list[Record]:
    """Every free text of a journal is an attack."""
    declared, *rest = long_run(3)
    assert isinstance(declared, ev.RunDeclared)
    rename = {"a": f"a{EVIL}", "b": "b", "c": "c"}
    events: list[ev.Event] = [dataclasses.replace(declared, run=f"run {EVIL}")]
    for event in rest:
        if isinstance(event, ev.EpochBegan):
            event = dataclasses.replace(event, version=EVIL)
        if isinstance(event, ev.NodeJoined):
            event = dataclasses.replace(event, node=rename[event.node], domain=EVIL)
        events.append(event)
    at = events[-1].at + 1
    node = rename["a"]
    events += [
        ev.FaultRequested(at=at, fault=EVIL, node=node, slot=None, parameters={EVIL: EVIL}, by=EVIL),
        ev.FaultInjected(at=at, number=1, detail=EVIL),
        ev.CheckpointFailed(at=at, step=30, error=EVIL),
        ev.WorkerFailed(at=at, node=node, generation=1, slot=0, step=30, kind="exception", error=EVIL),
        ev.NodeHalted(at=at + 1, node=node, generation=1, snapshots={}),
        ev.NodeLost(at=at + 1, node="b", cause=EVIL),
        ev.StopRequested(at=at + 2, by=EVIL, graceful=False),
    ]
    return records_of(events)


def test_text_of_the_journal_stays_text() -> None:
    tame = page_of(records_of(long_run(3)))
    page = page_of(evil_run())
    figures = [a["id"] for a, _ in page.find("script", type="application/json")]
    assert len(page.find("script")) == len(tame.find("script")) and figures[0] == "report-data"
    assert not page.find("img") and not [a for _, a, _, _ in page.elements if any(key[:2] == "on" for key in a)]
    # (Plotly's own source, which is no page's text, has examples of markup in it.)
    plotly = max((text for _, text in page.find("script") if "plotly.js" in text[:200]), key=len)
    assert "alert(" not in plotly
    assert page.find("h1")[0][1] == f"run {EVIL}"
    assert EVIL in page.text("incident-1") and EVIL in page.text("checkpoints") and EVIL in page.text("facts")
    assert "49" not in page.find("h1")[0][1]
    for name in figures[1:]:
        ((_, raw),) = page.find("script", id=str(name))
        assert "<" not in raw
        for trace_ in json.loads(raw)["data"]:
            for text in [*(trace_.get("hovertext") or []), *(trace_.get("text") or [])]:
                assert "<script" not in text and "<img" not in text, "Plotly would read it as markup"
        assert all("<script" not in tick for tick in json.loads(raw)["layout"]["yaxis"].get("ticktext", []))


def test_credentials_in_urls_do_not_get_into_the_page() -> None:
    events = long_run(3)
    at = events[-1].at
    error = "cannot write s3://AKIAKEY:hunter2@bucket/run: https://host/x?X-Amz-Signature=feedbeef refused"
    events.append(ev.CheckpointFailed(at=at, step=30, error=error))
    events.append(ev.FaultRequested(at=at, fault="node-kill", node="a", slot=None, parameters={}, by=error))
    events.append(ev.FaultInjected(at=at, number=1, detail=f'{error} "'))
    events.append(ev.NodeLost(at=at, node="a", cause=error))
    text = render(records_of(events))
    assert "bucket/run" in text
    assert [secret for secret in ("AKIAKEY", "hunter2", "feedbeef") if secret in text] == []


def test_the_page_fetches_nothing() -> None:
    page = page_of(chaos_run())
    fetching = ("src", "href", "srcset", "action", "data", "poster", "background", "formaction", "ping")
    targets = [a[key] for _, a, _, _ in page.elements for key in fetching if key in a]
    assert all(str(target).startswith("#") for target in targets), targets
    assert not page.find("link") and not page.find("iframe") and not page.find("base")
    ((_, style),) = page.find("style")
    assert "url(" not in style and "@import" not in style
    policies = [a["content"] for a, _ in page.find("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and str(policies[0]).startswith("default-src 'none';")
    assert not re.search(r"https?:", str(policies[0]))
    assert page.raw.count("plotly.js v") == 1, "Plotly's JavaScript stands in the page once"


def test_records_without_a_declaration_are_no_run() -> None:
    began = ev.EpochBegan(at=0, epoch=1, version="test")
    with pytest.raises(ReportError, match="does not say which run"):
        render(records_of([began]))


def test_a_run_whose_training_never_began_has_a_page() -> None:
    declared, began, found, *_ = long_run(1)
    page = page_of(records_of([declared, began, found]))
    assert "No node's time has been settled" in page.text("verdict")
    assert "training never began" in page.text("generations")
    refused = ev.NodesRefused(at=60 * SECOND, error="node n1 did not come up: out of disk")
    page = page_of(records_of([declared, began, found, refused]))
    assert "out of disk" in page.text("verdict") and "Exit code 1 means" in page.text("verdict")
    assert isinstance(page.json("report-data")["ledger_us"]["provisioning"], int)


def test_a_mesh_that_shrinks_and_grows_is_told_by_its_replicas() -> None:
    page = page_of(trace("shrink_and_grow"))
    shrunk, grown = (text for _, text in page.find("article", under="incidents"))
    assert "the mesh went on with 2 replicas instead of 3, without c and f, and its workers restored step 40" in shrunk
    assert "the mesh grew from 2 to 3 replicas, with f and g, and its workers restored step 50" in grown
    records = trace("shrink_and_grow")
    grows = next(i for i, record in enumerate(records) if isinstance(record.event, ev.TimerFired))
    assert "2 replicas were there last" in page_of(records[:grows]).text("facts")
    assert "there last" not in page.text("facts")


def test_a_mesh_that_becomes_another_is_told_by_its_degrees() -> None:
    records = trace("shrink_reshards")
    page = page_of(records)
    other, back = (text for _, text in page.find("article", under="incidents"))
    became = "the mesh, until then the declared one, became one of tp 2, without b, and its workers restored step 39"
    assert became in other
    assert "the mesh, until then one of tp 2, became the declared one, with c, and its workers restored step 50" in back
    grows = next(i for i, record in enumerate(records) if isinstance(record.event, ev.TimerFired))
    assert "it was last one of tp 2" in page_of(records[:grows]).text("facts")
    assert "last one of" not in page.text("facts")
