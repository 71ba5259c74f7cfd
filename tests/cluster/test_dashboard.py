"""Every query of the dashboard, run against a real Prometheus that scraped a real run in which a worker was killed."""

from __future__ import annotations

import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Cluster
from herd import job, spec_of, train

from orchestrator.chaos.command import give
from orchestrator.chaos.orders import Order
from orchestrator.core.goodput import LABELS
from orchestrator.observe import prometheus
from orchestrator.observe.status import Status
from orchestrator.runtime import driver

pytestmark = pytest.mark.timeout(300)

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "shepherd.json").read_text())
RULES = DEPLOY / "prometheus" / "shepherd.rules.yml"
RUN = "watched"
INTERVAL_S = 0.5


@dataclass(frozen=True)
class Watched:
    """A run that is over, and the Prometheus that watched it."""

    url: str
    status: Status
    began: float
    """Unix time; also of the end."""
    ended: float

    def api(self, path: str, **parameters: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=20) as a:
            answer = json.load(a)
        assert answer["status"] == "success", answer
        return answer["data"]

    def over_time(self, expr: str) -> dict[tuple[tuple[str, str], ...], list[float]]:
        """Labels to values from the run's beginning to its end, without those that are no number."""
        data = self.api("query_range", query=expr, start=self.began, end=self.ended, step=INTERVAL_S)
        values = {
            tuple(sorted(series["metric"].items())): [float(value) for _, value in series["values"] if value != "NaN"]
            for series in data["result"]
        }
        return {labels: found for labels, found in values.items() if found}

    def last(self, expr: str) -> dict[tuple[tuple[str, str], ...], float]:
        return {labels: values[-1] for labels, values in self.over_time(expr).items()}


@pytest.fixture(scope="module")
def watched(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp(RUN)
    spec = spec_of(job(RUN, folder, run={"steps": 30}, checkpoint={"interval_steps": 10}))
    (cluster.faults / f"{RUN}.py").write_text("import time; time.sleep(0.2)")
    ordered: list[int] = []
    began = time.time()
    with prometheus.recording(folder / "prometheus", RULES, INTERVAL_S) as recorder:

        def watch(status: Status) -> None:
            recorder.scrape(status.metrics_address)
            if status.job == "training" and status.step >= 12 and not ordered:
                ordered.append(status.step)
                token = driver.read_token(spec.cluster.log_dir, RUN)
                give(driver.find(RUN), token, Order(scenario="worker-kill", rank=2), by="the test")

        status, told = train(spec, watch)
        assert status.exit_code == 0, told
        assert [(i.cause, i.rung) for i in status.incidents] == [("signal", "replace")], told
        yield Watched(url=recorder.url, status=status, began=began, ended=time.time())


def expressions() -> list[str]:
    """Of all panels and annotations, as Grafana sends them for this run."""
    targets = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    found = [each["expr"] for each in (*targets, *DASHBOARD["annotations"]["list"])]
    values = {"$run": RUN, "$__interval": f"{INTERVAL_S * 1000:.0f}ms", "$__rate_interval": f"{4 * INTERVAL_S:.0f}s"}
    for name in sorted(values, key=len, reverse=True):
        found = [expr.replace(name, values[name]) for expr in found]
    assert not any("$" in expr for expr in found), found
    return found


@pytest.mark.parametrize("expr", expressions())
def test_every_query_of_the_dashboard_returns_data(watched: Watched, expr: str) -> None:
    assert watched.over_time(expr), expr


def test_the_variables_find_the_run(watched: Watched) -> None:
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "datasource":
            assert variable["query"] == "prometheus"
            continue
        series, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]).groups()
        assert watched.api(f"label/{label}/values", **{"match[]": series}) == [RUN]


def test_the_recorded_goodput_is_the_ledgers(watched: Watched) -> None:
    """What the newest scrape told is at most a few seconds behind the run's end."""
    assert watched.status.goodput is not None
    seconds = watched.over_time("run_label:shepherd_node_seconds_total:max")
    grown = {dict(labels)["label"]: values[-1] - values[0] for labels, values in seconds.items()}
    since_the_first_scrape = grown["productive"] / sum(grown.values())  # which comes seconds after the beginning
    names = {"goodput:ratio": watched.status.goodput}
    names |= {f"goodput:ratio_rate{window}": since_the_first_scrape for window in ("1h", "24h")}
    without_spares = [f"goodput_without_spares:ratio_rate{window}" for window in ("5m", "1h", "24h")]
    names |= dict.fromkeys(without_spares, since_the_first_scrape)  # this run has none
    for name, expected in names.items():
        ((labels, value),) = watched.last(f"run:shepherd_{name}").items()
        assert dict(labels)["run"] == RUN
        assert value == pytest.approx(expected, abs=0.1), name
    shares = watched.last(f'max by (label) (shepherd_node_seconds_total{{run="{RUN}"}})')
    assert {dict(labels)["label"] for labels in shares} == set(LABELS)
    for labels, value in shares.items():
        assert value <= watched.status.ledger_s[dict(labels)["label"]] + 1e-6


def test_the_annotations_mark_what_happened_once(watched: Watched) -> None:
    marks = {
        a["name"]: a["expr"].replace("$run", RUN).replace("$__interval", "500ms")
        for a in DASHBOARD["annotations"]["list"]
    }
    interruptions = {
        dict(labels)["cause"]: values for labels, values in watched.over_time(marks["Interruptions"]).items()
    }
    assert set(interruptions) == {"signal"} and len(interruptions["signal"]) <= 2
    chaos = {dict(labels)["fault"]: values for labels, values in watched.over_time(marks["Chaos"]).items()}
    assert set(chaos) == {"worker-kill"} and len(chaos["worker-kill"]) <= 2


def test_the_rules_are_healthy_and_no_alert_fires_in_a_run_that_recovers(watched: Watched) -> None:
    groups = watched.api("rules")["groups"]
    assert len(groups) == 5
    assert [(r["name"], r.get("lastError")) for g in groups for r in g["rules"] if r["health"] != "ok"] == []
    assert watched.over_time('ALERTS{alertstate="firing"}') == {}
