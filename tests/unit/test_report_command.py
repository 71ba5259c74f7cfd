"""`shepherd report`: where it finds the journal, and what it says when it cannot make a page."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from journal_runs import keep
from report_pages import Page, long_run, records_of, trace, write_journal
from typer.testing import CliRunner

from orchestrator.cli import EXIT_REFUSED, app
from orchestrator.core.supervisor import Supervisor
from orchestrator.observe import report_charts
from orchestrator.observe.report import write_report
from orchestrator.runtime import driver, journal
from orchestrator.runtime.journal import Journal, claim_epoch
from orchestrator.runtime.journal_lines import chained, encode


def test_a_run_that_is_under_way_is_read_to_the_end_of_its_tail(tmp_path: Path) -> None:
    url, folder = str(tmp_path / "run"), tmp_path / "logs" / "llama"
    records = trace("worker_killed")
    supervisor = Supervisor()
    held = Journal(url, journal.tail_path(folder, url), claim_epoch(url, "test").epoch)
    for i, record in enumerate(records):
        held.append(record.event, supervisor.handle(record.event))
        if i == len(records) - 3:
            held.publish()
    keep(held)
    foreign = journal.tail_path(folder, "another/url")
    foreign.write_bytes(b'{"seq":1,"digest":"x"}\n')
    out = tmp_path / "report.html"

    def n_records() -> str:
        return next(text for _, text in Page(out.read_text()).find("dd") if "replayed" in text)

    write_report(url, out)
    assert n_records().startswith(f"{len(records) - 2} records")
    write_report(url, out, str(tmp_path / "logs"))
    assert n_records().startswith(f"{len(records)} records")
    held.close()


def shepherd_report(*arguments: object) -> str:
    """Runs the command, which must refuse, and returns its only line."""
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert result.exit_code == EXIT_REFUSED and result.stdout == "", (result.stdout, result.stderr, result.exception)
    (line,) = str(result.stderr).splitlines()
    return line.removeprefix("error: ")


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    url, out = f"memory://{tmp_path}/run", tmp_path / "a folder" / "page.html"
    write_journal(url, tmp_path / "tail", trace("first_start"))
    result = CliRunner().invoke(app, ["report", url, "-o", str(out), "--log-dir", str(tmp_path)])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(str(out)) and "Completed 100 of 100" in Page(out.read_text()).text("verdict")
    assert [text for _, text in Page(out.read_text()).find("dd") if text.endswith("UTC")], "when it was declared"


def test_the_name_of_an_active_run_stands_for_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "run")
    write_journal(url, tmp_path / "tail", trace("worker_killed"))
    asked: list[object] = []
    monkeypatch.setattr(driver, "connect", asked.append)
    monkeypatch.setattr(driver, "find", lambda run: asked.append(run) or "controller")
    monkeypatch.setattr(driver, "where", lambda controller, token: asked.append((controller, token)) or url)
    monkeypatch.setenv("SHEPHERD_TOKEN", "secret")
    out = tmp_path / "r.html"
    result = CliRunner().invoke(app, ["report", "job", "-o", str(out), "--address", "head:1"])
    assert result.exit_code == 0, result.stderr
    assert asked == ["head:1", "job", ("controller", "secret")]
    assert "secret" not in out.read_text().split("plotly.js v")[0]


def test_what_is_no_run_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "r.html"
    line = shepherd_report(tmp_path / "none", "-o", out)
    assert line == f"{tmp_path}/none: there is no run: no controller has ever begun under it"
    assert "nosuch" in shepherd_report("nosuch://bucket/run", "-o", out)

    def no_cluster(address: str | None) -> None:
        raise driver.RunError("no Ray cluster answers: start one")

    monkeypatch.setattr(driver, "connect", no_cluster)
    assert shepherd_report("job").startswith("job: there is no such folder here; as the name of an active run: no Ray")

    url = str(tmp_path / "begun")
    claim_epoch(url, "test")
    assert "is empty: a controller began" in shepherd_report(url, "-o", out)
    assert not out.exists()


def test_a_journal_that_cannot_be_read_is_refused_in_a_line(tmp_path: Path) -> None:
    url, out = str(tmp_path / "run"), tmp_path / "r.html"
    write_journal(url, tmp_path / "tail", trace("worker_killed"))
    segment = max((tmp_path / "run" / "journal").iterdir())
    whole = segment.read_bytes()
    segment.write_bytes(whole.replace(b'"first":', b'"begin":'))
    assert "damage" in shepherd_report(url, "-o", out)
    segment.write_bytes(whole[:-40])
    assert "is cut off, or not all there" in shepherd_report(url, "-o", out)
    segment.write_bytes(whole)
    out.mkdir()
    assert str(out) in shepherd_report(url, "-o", out)


def test_a_journal_of_an_older_version_is_refused_in_a_line(tmp_path: Path) -> None:
    """Its chain holds, but its events are others."""
    url = str(tmp_path / "run")
    (first, *_) = records = trace("worker_killed")
    old = Journal(url, tmp_path / "tail", claim_epoch(url, "0.0.1").epoch)
    old.append(first.event, Supervisor().handle(first.event))
    old._pending.append(_of_another_version(old))
    old.publish()
    line = shepherd_report(url)
    assert "record 2 is not one that this version reads" in line and len(records) > 2


def _of_another_version(held: Journal) -> bytes:
    document = {"seq": 2, "epoch": 1, "event": {"type": "WorkerSneezed", "at": 1}, "actions": []}
    return encode(document | {"digest": chained(held.head[1], document)})


def test_a_journal_of_10_000_records_takes_seconds(tmp_path: Path) -> None:
    records = records_of(long_run(10_200))
    assert len(records) > 10_300
    url = str(tmp_path / "run")
    write_journal(url, tmp_path / "tail", records)
    began = time.process_time()
    write_report(url, tmp_path / "report.html")
    took_s = time.process_time() - began
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.find("article")) == 20
    assert len(page.json("figure-loss")["data"][0]["x"]) <= report_charts.POINTS_SHOWN + 2
    assert (tmp_path / "report.html").stat().st_size < 8e6
    assert took_s < 20, "CPU seconds; 3 on two cores of 2026"
