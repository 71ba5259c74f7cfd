"""The run as people see it: metrics over a real port, by Prometheus' own parser; pictures of hostile histories."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import pytest
from core_body import Body
from core_world import Tape
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.chaos.orders import SCENARIOS
from orchestrator.core import recovery
from orchestrator.core.goodput import LABELS
from orchestrator.core.state import JOB_STATES, NODE_STATES, TRUSTS, USABLE, Fault, State
from orchestrator.core.supervisor import Supervisor
from orchestrator.observe import exporter
from orchestrator.observe.exporter import CAUSES, RUNGS, families, serve_metrics
from orchestrator.observe.notices import notices
from orchestrator.observe.status import CheckpointStatus, IncidentStatus, Status, status_of
from orchestrator.spec import JobSpec, parse

INCIDENT = IncidentStatus(
    number=1,
    cause="signal",
    culprit="n2",
    detail="signal 9",
    rung="replace",
    rungs=("replace",),
    reason="the worker died",
    step=40,
    steps_lost=2,
    at_s=100.0,
    teardown_s=0.25,
    restart_s=1.5,
    restore_s=0.5,
    first_step_s=0.75,
    total_s=3.0,
    processes={"parked": 3, "warm": 1},
    cost_node_s=9.0,
)
WHOLE = CheckpointStatus(step=20, generation=2, trust="verified", doubt="", by="n3", why="9 bytes read", pinned=True)
PICTURE = Status(
    copied_step=18,
    run="llama",
    job="training",
    epoch=2,
    generation=3,
    step=41,
    total_steps=100,
    high_water=43,
    loss=3.25,
    grad_norm=0.5,
    lr=3e-4,
    tokens_per_s=1234.5,
    step_s=0.5,
    wall_clock_s=200.0,
    places=5,
    replicas=3,
    replicas_declared=3,
    fallback="",
    goodput=0.75,
    ledger_s={label: float(n) for n, label in enumerate(LABELS)},
    ledger_us={label: n * 1_000_000 for n, label in enumerate(LABELS)},
    owed_us=1_000_000_000,
    pending_us=1,
    processes={"parked": 9, "warm": 2, "forked": 5},
    incidents=(
        INCIDENT,
        replace(INCIDENT, number=2, steps_lost=3),
        replace(INCIDENT, number=3, cause="node", rung="spare", total_s=None, first_step_s=None),
        replace(INCIDENT, number=4, cause="collective", rung="", teardown_s=None, restart_s=None, total_s=None),
    ),
    recoveries_without_progress=1,
    faults=(
        Fault(number=1, fault="flip", node="n2", slot=2, step=40, ordered_at=1, injected_at=2, detail="1 bit"),
        Fault(number=2, fault="flip", node="n2", slot=2, step=40, ordered_at=3, injected_at=4, detail="not done: gone"),
        Fault(number=3, fault="worker-kill", node="n1", slot=0, step=40, ordered_at=5),
    ),
    nodes={"n1": "active", "n2": "active", "n3": "spare", "n4": "lost", "n5": "quarantined"},
    standings={"n2": "suspect"},
    strikes={"n2": 2, "n5": 3},
    slow=("n1",),
    misread={"n2": "checkpoint 20, which n1 found whole afterwards: block 7"},
    mesh=("n1", "n2"),
    checkpoints=(20, 40),
    trust=(
        replace(WHOLE, step=10, trust="damaged", by="n1 and n3", why="rank-00000.bin: block 3", pinned=False),
        WHOLE,
        replace(WHOLE, step=40, trust="committed", doubt="n1: block 9", by="", why="", pinned=False),
    ),
    verifying=40,
    verifications={"whole": 5, "damaged": 1, "misread": 1, "unread": 0},
    newest_verified=20,
    newest_verified_age_s=72.0,
    newest_checkpoint=40,
    newest_checkpoint_age_s=12.0,
    save_every_steps=20,
    save_every_why="Young and Daly want 20",
    saves_failed=4,
    save_error="step 40: No space left on device: /secret/path",
    hold="",
    failure="",
    ended=False,
    exit_code=None,
    verdict="",
    metrics_address="127.0.0.1:1",
    controller_pid=1,
)
ENDED = replace(PICTURE, exit_code=94)
"""Has a value for every metric."""
NOTHING_YET = replace(
    PICTURE, loss=None, grad_norm=None, lr=None, tokens_per_s=None, goodput=None, checkpoints=(), incidents=()
)
NOTHING_YET = replace(
    NOTHING_YET, newest_checkpoint=None, newest_checkpoint_age_s=None, hold="disk full", job="waiting", nodes={}
)
UNREAD = dict.fromkeys(PICTURE.verifications, 0)
NOTHING_YET = replace(NOTHING_YET, trust=(), newest_verified=None, newest_verified_age_s=None, verifications=UNREAD)
NOTHING_YET = replace(NOTHING_YET, run="", step_s=None, strikes={}, faults=(), saves_failed=0, save_error="")


def spec(port: int = 0, bind: str = "127.0.0.1") -> JobSpec:
    return parse({"run": {"name": "llama", "url": "/runs/llama"}, "metrics": {"bind": bind, "port": port}})


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A controller's loop, running."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def scrape(port: int, host: str = "127.0.0.1") -> str:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return str(answer.read().decode())


def samples(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Name to the values of its labels (in the order of their names, without the run's) to value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("run") == "llama", sample
            found.setdefault(sample.name, {})[tuple(labels[name] for name in sorted(labels))] = sample.value
    return found


def test_a_scrape_shows_the_whole_picture(loop):
    found = samples(scrape(serve_metrics(spec(), lambda: PICTURE, loop)))
    assert {name: values[()] for name, values in found.items() if () in values} == {
        "shepherd_step": 41,
        "shepherd_steps_target": 100,
        "shepherd_steps_high_water": 43,
        "shepherd_loss": 3.25,
        "shepherd_gradient_norm": 0.5,
        "shepherd_learning_rate": 3e-4,
        "shepherd_tokens_per_second": 1234.5,
        "shepherd_goodput_ratio": 0.75,
        "shepherd_places": 5,
        "shepherd_replicas": 3,
        "shepherd_replicas_target": 3,
        "shepherd_fallback_mesh": 0,
        "shepherd_epoch": 2,
        "shepherd_generation": 3,
        "shepherd_hold": 0,
        "shepherd_checkpoint_age_seconds": 12,
        "shepherd_checkpoint_step": 40,
        "shepherd_checkpoint_verified_step": 20,
        "shepherd_checkpoint_verified_age_seconds": 72,
        "shepherd_checkpoint_interval_steps": 20,
        "shepherd_checkpoint_failing": 1,
        "shepherd_copy_step": 18,
        "shepherd_checkpoint_failures_total": 4,
        "shepherd_step_seconds": 0.5,
        "shepherd_steps_lost_total": 5,
        "shepherd_recoveries_without_progress": 1,
        "shepherd_recoveries_without_progress_limit": 8,
    }
    assert found["shepherd_node_seconds_total"] == {(label,): n for n, label in enumerate(LABELS)}
    assert found["shepherd_slots_filled_total"] == {("parked",): 9, ("warm",): 2, ("forked",): 5}
    assert found["shepherd_nodes"] == {
        ("active",): 2,
        ("spare",): 1,
        ("quarantined",): 1,
        ("probed",): 0,
        ("lost",): 1,
    }
    assert set(NODE_STATES) == {state for (state,) in found["shepherd_nodes"]}
    trusts = {("damaged",): 1, ("verified",): 1, ("committed",): 1}
    assert found["shepherd_checkpoints"] == {(trust,): trusts.get((trust,), 0) for trust in TRUSTS}
    assert found["shepherd_checkpoint_verifications_total"] == {(o,): n for o, n in PICTURE.verifications.items()}
    assert found["shepherd_node_strikes"] == {("n2",): 2, ("n5",): 3}
    assert found["shepherd_node_quarantined"] == {("n5",): 1}
    assert found["shepherd_job_state"] == {(state,): float(state == "training") for state in JOB_STATES}
    incidents = {("signal",): 2, ("node",): 1}  # the cause of the fourth may change
    assert found["shepherd_incidents_total"] == {(cause,): incidents.get((cause,), 0) for cause in CAUSES}
    assert seen(found["shepherd_incident_node_seconds_total"]) == {("signal",): 18}
    assert found["shepherd_node_incidents_total"] == {("signal", "n2"): 2, ("node", "n2"): 1}
    assert found["shepherd_faults_injected_total"] == {(fault,): float(fault == "flip") for fault in SCENARIOS}
    assert found["shepherd_recoveries_total"] == {(rung,): 2 * (rung == "replace") for rung in RUNGS}
    assert seen(found["shepherd_recovery_seconds_total"]) == {
        ("teardown", "replace"): 0.5,
        ("restart", "replace"): 3.0,
        ("restore", "replace"): 1.0,
        ("first_step", "replace"): 1.5,
    }


def seen(values: dict[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    """Without the counters that wait at 0 for their first time."""
    return {labels: value for labels, value in values.items() if value}


def test_what_is_not_known_yet_is_left_out(loop):
    found = samples(scrape(serve_metrics(spec(), lambda: NOTHING_YET, loop)))
    absent = ("loss", "gradient_norm", "learning_rate", "tokens_per_second", "goodput_ratio", "checkpoint_step")
    more = ("exit_code", "checkpoint_age_seconds", "step_seconds", "node_strikes", "node_quarantined")
    verified = ("checkpoint_verified_step", "checkpoint_verified_age_seconds")
    assert not {f"shepherd_{name}" for name in (*absent, *more, *verified)} & set(found)
    assert found["shepherd_checkpoint_failing"] == {(): 0}
    assert found["shepherd_hold"] == {(): 1}
    assert found["shepherd_steps_lost_total"] == {(): 0}
    assert set(found["shepherd_nodes"].values()) == {0}


def test_each_scrape_is_a_new_picture_taken_on_the_controllers_loop(loop):
    threads: list[threading.Thread] = []

    def status() -> Status:
        threads.append(threading.current_thread())
        return replace(PICTURE, step=len(threads))

    port = serve_metrics(spec(), status, loop)
    steps = [samples(scrape(port))["shepherd_step"][()] for _ in range(3)]
    assert steps == [1, 2, 3]
    assert len(set(threads)) == 1 and threads[0] is not threading.current_thread()


def test_names_types_and_help_follow_the_conventions_of_prometheus(loop):
    text = scrape(serve_metrics(spec(), lambda: PICTURE, loop))
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("shepherd_"), family
        assert family.documentation.endswith("."), family
        assert family.type in ("counter", "gauge"), family
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample
            assert not any(unit in sample.name for unit in ("_ms", "_us", "_minutes", "_percent")), sample
    times = [f.name for f in text_string_to_metric_families(text) if "seconds" in f.documentation.lower()]
    assert all("seconds" in name or name.endswith("_ratio") for name in times), times


def test_every_counter_is_there_before_its_first_event(loop):
    """`increase` does not see a series that is born at 1."""
    first = samples(scrape(serve_metrics(spec(), lambda: NOTHING_YET, loop)))
    later = samples(scrape(serve_metrics(spec(), lambda: PICTURE, loop)))
    late = {name for name in later if name.endswith("_total") and set(later[name]) - set(first.get(name, {}))}
    assert late == {"shepherd_node_incidents_total"}, "which nodes it will be is not known before"
    assert all(value == 0 for (cause,), value in first["shepherd_incidents_total"].items())


def test_causes_and_rungs_are_those_of_the_supervisor():
    assert set(CAUSES) == set(recovery._ROOTS)
    assert set(RUNGS) == {*recovery._RAM_RUNGS, "durable"}


def test_labels_hold_no_text_of_an_error_and_not_too_many_names(loop):
    many = [replace(INCIDENT, number=n, culprit=f"n{n}", detail="token=abc") for n in range(1, 1500)]
    text = scrape(serve_metrics(spec(), lambda: replace(PICTURE, incidents=tuple(many), failure="token=abc"), loop))
    assert "secret" not in text and "abc" not in text and "not done" not in text
    found = samples(text)["shepherd_node_incidents_total"]
    assert (
        len(found) == exporter.NODE_INCIDENT_SERIES and ("signal", "n1") in found and ("signal", "n1499") not in found
    )


def test_promtool_has_nothing_to_say(loop):
    """It comes with Prometheus, which `make setup` installs."""
    text = scrape(serve_metrics(spec(), lambda: PICTURE, loop))
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True, timeout=60)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_the_port_of_the_spec_is_used_and_a_taken_one_refused(loop):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            serve_metrics(spec(port), lambda: PICTURE, loop)
    assert serve_metrics(spec(port), lambda: PICTURE, loop) == port
    assert "shepherd_step" in scrape(port)
    with pytest.raises(OSError, match="in use"):
        serve_metrics(spec(port), lambda: PICTURE, loop)


def test_only_the_address_of_the_spec_is_served(loop):
    port = serve_metrics(spec(bind="127.0.0.2"), lambda: PICTURE, loop)
    assert "shepherd_step" in scrape(port, "127.0.0.2")
    with pytest.raises(urllib.error.URLError, match="refused"):
        scrape(port)


def test_a_controller_that_cannot_answer_fails_the_scrape(loop, monkeypatch):
    def broken() -> Status:
        raise RuntimeError("no picture")

    with pytest.raises(urllib.error.HTTPError, match="500"):
        scrape(serve_metrics(spec(), broken, loop))
    monkeypatch.setattr(exporter, "SCRAPE_DEADLINE_S", 0.05)
    port = serve_metrics(spec(), lambda: PICTURE, loop)
    release = threading.Event()
    loop.call_soon_threadsafe(release.wait, 20)
    with pytest.raises(urllib.error.HTTPError, match="500"):
        scrape(port)
    release.set()


# --- pictures of hostile histories ---


def pictures(seed: int) -> Iterator[tuple[State, Status, list[str]]]:
    """The run's state after each event of a random history, as people see it, and what they are told."""
    body = Body(Tape(random.Random(seed).randbytes(300)))
    body.run()
    supervisor = Supervisor()
    for event, _ in body.watch.log:
        actions = supervisor.handle(event)
        yield supervisor.state, picture_of(supervisor, event.at), notices(event, actions, supervisor.state)


def picture_of(supervisor: Supervisor, at: int) -> Status:
    return status_of(
        supervisor.state,
        at=at,
        save_every_steps=20,
        hold="",
        failure="",
        ended=False,
        metrics_address="",
        newest=None,
        rates=[],
        tracebacks={},
    )


def counters(status: Status) -> dict[tuple[str, ...], float]:
    metrics: list[Metric] = [family for family in families(status, spec()) if family.type == "counter"]
    return {(s.name, *s.labels.values()): s.value for family in metrics for s in family.samples}


@pytest.mark.parametrize("seed", range(30))
def test_counters_never_fall_whatever_happens_to_the_run(seed):
    last: dict[tuple[str, ...], float] = {}
    for _, status, _ in pictures(seed):
        now = counters(status)
        assert set(last) <= set(now), "a counter is gone"
        assert all(now[name] >= value for name, value in last.items())
        last = now
    assert last["shepherd_node_seconds_total", "llama", "productive"] > 0


@pytest.mark.parametrize("seed", range(30))
def test_every_picture_is_true_and_can_be_sent(seed):
    told = []
    for state, status, lines in pictures(seed):
        assert json.loads(json.dumps(status.document()))["step"] == status.step
        assert sum(status.ledger_us.values()) + status.pending_us == status.owed_us
        trusted = [step for step, checkpoint in sorted(state.checkpoints.items()) if checkpoint.trust in USABLE]
        assert list(status.checkpoints) == trusted
        known = len(state.incidents) + (state.incident is not None)
        assert [i.number for i in status.incidents] == list(range(1, known + 1))
        for i in status.incidents:
            durations = [i.teardown_s, i.restart_s, i.restore_s, i.first_step_s, i.total_s]
            assert all(d is None or d >= 0 for d in durations), i
            assert i.cause and i.steps_lost >= 0
        assert all(line and "\n" not in line for line in lines)
        assert set(status.strikes) <= set(state.nodes) and all(status.strikes.values())
        told += lines
    assert any("generation 1 opens at step 0 from new weights" in line for line in told)
    assert any(line.startswith("the run ends: all") and line.endswith("(exit code 0)") for line in told)


@pytest.mark.parametrize("seed", range(10))
def test_what_lasts_is_seen_while_it_lasts_and_still_adds_up(seed):
    for state, status, _ in pictures(seed):
        at = round(status.wall_clock_s * 1e6) + state.began_at
        supervisor = Supervisor(state)
        later = picture_of(supervisor, at + 7_000_000)
        assert sum(later.ledger_us.values()) + later.pending_us == later.owed_us
        grown = 0 if state.job == "ended" or not state.run else 7_000_000 * state.ledger.places
        assert later.owed_us == status.owed_us + grown
        assert all(later.ledger_us[label] >= us for label, us in status.ledger_us.items())
        assert picture_of(supervisor, at).ledger_us == status.ledger_us, "looking changes nothing"


def test_a_run_that_has_failed_tells_its_exit_code(loop):
    found = samples(scrape(serve_metrics(spec(), lambda: ENDED, loop)))
    assert found["shepherd_exit_code"] == {(): 94}


def test_throughput_and_step_time_are_those_of_the_newest_steps():
    def speed(rates: list[tuple[float, int, int]]) -> tuple[float | None, float | None]:
        status = status_of(
            Supervisor().state,
            at=0,
            save_every_steps=20,
            hold="",
            failure="",
            ended=False,
            metrics_address="",
            newest=None,
            rates=rates,
            tracebacks={},
        )
        return status.tokens_per_s, status.step_s

    assert speed([]) == (None, None)
    assert speed([(1.0, 1, 64)]) == (None, None)
    assert speed([(1.0, 1, 64), (1.0, 2, 64)]) == (None, None)
    assert speed([(10.0, 1, 999), (10.5, 2, 64), (11.0, 3, 64), (12.0, 4, 64)]) == (96.0, 2 / 3)
    assert speed([(10.0, 1, 999), (12.0, 5, 64)]) == (32.0, 0.5), "a report between was lost"
