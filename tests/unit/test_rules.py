"""The rules for Prometheus, by Prometheus' own tool: they are valid, they fire when they must and only then.

promtool comes with Prometheus, which `make setup` installs; without it these tests fail.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_exporter import ENDED, spec

from orchestrator.observe.exporter import families

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
RULES = FOLDER / "shepherd.rules.yml"
TESTS = [FOLDER / "tests.yml", FOLDER / "long-tests.yml"]


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rules(kind: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def test_the_rules_and_the_example_are_valid() -> None:
    assert "SUCCESS" in promtool("check", "rules", "--lint-fatal", RULES)
    assert "is valid prometheus config" in promtool("check", "config", FOLDER / "prometheus.yml")


@pytest.mark.parametrize("tests", TESTS, ids=lambda path: path.stem)
def test_the_rules_do_what_their_tests_say(tests: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", tests)


def test_a_wrong_expectation_fails(tmp_path: Path) -> None:
    """The tests above can fail."""
    document = yaml.safe_load(TESTS[0].read_text())
    (hold,) = [test for test in document["tests"] if test["name"].startswith("ShepherdHold")]
    hold["input_series"][0]["values"] = "0x10"
    document |= {"rule_files": [str(RULES)], "tests": [hold]}
    (tmp_path / "wrong.yml").write_text(yaml.safe_dump(document))
    with pytest.raises(AssertionError, match="ShepherdHold"):
        promtool("test", "rules", tmp_path / "wrong.yml")


def test_each_alert_says_what_is_wrong_and_what_to_do() -> None:
    for alert in rules("alert"):
        assert alert["labels"]["severity"] in ("page", "ticket"), alert
        summary, description = alert["annotations"]["summary"], alert["annotations"]["description"]
        assert "{{ $labels.run }}" in summary and summary.endswith("."), summary
        assert len(description) > 100 and description.endswith("."), description


def test_each_alert_is_tested_where_it_fires_and_where_it_does_not() -> None:
    evaluations: dict[str, list[bool]] = {rule["alert"]: [] for rule in rules("alert")}
    assert evaluations
    for path in TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            name, _, rest = test["name"].partition(":")
            for evaluation in test["promql_expr_test"] if rest else []:
                if "ALERTS" in evaluation["expr"]:
                    evaluations[name].append(bool(evaluation["exp_samples"]))
    assert {name: set(seen) for name, seen in evaluations.items()} == {name: {True, False} for name in evaluations}


def test_rules_use_the_metrics_that_a_run_serves() -> None:
    served = {f.name + "_total" * (f.type == "counter") for f in families(ENDED, spec())}
    recorded = {rule["record"] for rule in rules("record")}
    used = {name for rule in rules("expr") for name in re.findall(r"[a-z_:]*shepherd[a-z0-9_:]*", rule["expr"])}
    assert len(used) > 10 and used <= served | recorded, used - served - recorded


def test_the_docs_have_every_alert() -> None:
    page = (FOLDER.parents[1] / "docs" / "monitoring.md").read_text()
    assert set(re.findall(r"^\| `(Shepherd\w+)` \|", page, re.M)) == {rule["alert"] for rule in rules("alert")}
