"""The dashboard is current, is what Grafana's own types say, and shows a run's metrics only; how to look at it."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from test_exporter import PICTURE, spec

from orchestrator.core.goodput import LABELS
from orchestrator.observe import prometheus
from orchestrator.observe.exporter import families

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "shepherd.rules.yml"
GENERATOR = runpy.run_path(str(DEPLOY / "grafana" / "dashboard.py"))
DASHBOARD = json.loads((DEPLOY / "grafana" / "shepherd.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def test_the_dashboard_is_not_stale() -> None:
    command = "python deploy/grafana/dashboard.py > deploy/grafana/shepherd.json"
    assert GENERATOR["dashboard"]() == DASHBOARD, f"run: {command}"


def test_grafanas_types_read_it_and_lose_nothing() -> None:
    register_default_plugins()
    read = json.loads(json.dumps(Dashboard.from_json(DASHBOARD), cls=JSONEncoder))
    more = GENERATOR["ANNOTATIONS"]  # fields of the data source, which the SDK does not know
    for annotation in read["annotations"]["list"]:
        annotation |= more[annotation["name"]]
    assert read == DASHBOARD


def test_panels_have_names_explanations_and_a_place_of_their_own() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24 and not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    assert all(panel["description"].endswith(".") and panel["targets"] for panel in PANELS)


def test_queries_are_of_the_chosen_run_and_of_metrics_that_it_serves() -> None:
    served = {f.name + "_total" * (f.type == "counter") for f in families(PICTURE, spec())}
    groups = yaml.safe_load(RULES.read_text())["groups"]
    recorded = {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}
    targets = [target for panel in PANELS for target in panel["targets"]] + DASHBOARD["annotations"]["list"]
    for target in targets:
        names = re.findall(r"[a-z_:]*shepherd[a-z0-9_:]*", target["expr"])
        assert set(names) <= served | recorded, target["expr"]
        of_runs = [name for name in names if name != "shepherd:goodput_objective:ratio"]
        assert target["expr"].count('run="$run"') == len(of_runs), target["expr"]
        assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_the_objective_and_the_labels_are_the_rules_and_the_ledgers() -> None:
    rules = {
        rule.get("record"): rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    }
    assert rules["shepherd:goodput_objective:ratio"]["expr"] == f"vector({GENERATOR['OBJECTIVE']})"
    assert set(GENERATOR["COLOURS"]) == set(LABELS)


# --- Prometheus beside a run ---


def test_what_was_recorded_can_be_looked_at_as_the_hint_says(tmp_path: Path) -> None:
    with prometheus.recording(tmp_path / "kept", RULES, 0.1) as recorder:
        recorder.scrape("127.0.0.1:1")
        await_series(recorder.url, "shepherd:goodput_objective:ratio", [0.95])
        await_series(recorder.url, "up", [0.0])
    text = prometheus.hint(tmp_path / "kept", "my-run")
    assert "my-run" in text and "docs/monitoring.md" in text
    (command,) = re.findall(r"^    (prometheus .*)$", text, re.M)
    with prometheus.recording(tmp_path / "other", RULES, 1) as other:
        free = other.url.removeprefix("http://")  # a free port, once that one has ended
    process = subprocess.Popen(shlex.split(command.replace(prometheus.VIEW_ADDRESS, free)), stderr=subprocess.DEVNULL)
    try:
        await_series(f"http://{free}", "max_over_time(up[1h])", [0.0])
        await_series(f"http://{free}", "last_over_time(shepherd:goodput_objective:ratio[1h])", [0.95])
        (page,) = re.findall(rf"http://{re.escape(prometheus.VIEW_ADDRESS)}/graph\S+", text)
        for name, (expr,) in urllib.parse.parse_qs(urllib.parse.urlsplit(page).query).items():
            if name.endswith(".expr"):
                assert 'run="my-run"' in expr
                query(f"http://{free}", expr)
    finally:
        process.terminate()
        process.wait(20)


def test_a_prometheus_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.yml"
    broken.write_text("groups: [{name: x, rules: [{record: y, expr: '('}]}]")
    with pytest.raises(prometheus.PrometheusError, match="does not start"):
        with prometheus.recording(tmp_path / "a", broken, 1):
            pass
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(prometheus.PrometheusError, match="make setup"):
        with prometheus.recording(tmp_path / "b", RULES, 1):
            pass


def await_series(url: str, expr: str, values: list[float]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if query(url, expr) == values:
                return
        except OSError:
            pass  # it does not listen yet
        assert time.monotonic() < deadline, (expr, values)
        time.sleep(0.05)


def query(url: str, expr: str) -> list[float]:
    with urllib.request.urlopen(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expr})}", timeout=20) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return [float(series["value"][1]) for series in found]
