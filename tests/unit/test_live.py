"""What a run prints, on a pipe as a job's log is one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_exporter import INCIDENT, PICTURE, spec

from orchestrator.core.goodput import LABELS
from orchestrator.observe import live


def test_the_view_of_a_log_prints_news_at_once_and_progress_now_and_then(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    with live.view(spec()) as show:
        show(PICTURE, ["node n1 joined (1 of 5)", "[bold]not markup[/]"])
        show(replace(PICTURE, step=42), [])
        now[0] += live.PLAIN_INTERVAL_S + 1
        show(replace(PICTURE, step=43, hold="disk full", wall_clock_s=3725.5, replicas=2), [])
        now[0] += live.PLAIN_INTERVAL_S + 1
        show(replace(PICTURE, step=44, replicas=2, fallback="pp 2 x tp 2"), [])
        now[0] += live.PLAIN_INTERVAL_S + 1
        show(replace(PICTURE, job="halting"), ["rank 3 on n2 was killed by signal 9"])
    assert capsys.readouterr().out.splitlines() == [
        "run llama: 1000 steps, state in /runs/llama",
        "[  3:20.0] node n1 joined (1 of 5)",
        "[  3:20.0] [bold]not markup[/]",
        "[  3:20.0] step 41/100 loss 3.2500  1,234 tokens/s  goodput 75.0%",
        "[ 62:05.5] step 43/100 loss 3.2500  1,234 tokens/s  goodput 75.0%  2 of 3 replicas  HOLD",
        "[  3:20.0] step 44/100 loss 3.2500  1,234 tokens/s  goodput 75.0%  fallback mesh pp 2 x tp 2",
        "[  3:20.0] rank 3 on n2 was killed by signal 9",
    ]


def test_a_run_goes_on_when_its_news_cannot_be_written():
    """And its exit code is its own."""
    code = """
import sys
from dataclasses import replace
from test_exporter import PICTURE, spec
from orchestrator.observe import live
with live.view(spec()) as show:
    for step in range(3):
        show(replace(PICTURE, step=step), ["news"])
live.print_end(replace(PICTURE, exit_code=93), "/logs")
sys.exit(93)
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])},
            timeout=120,
        )
    assert done.returncode == 93, done.stderr
    assert done.stderr.count("standard output cannot be written") == 1 and "No space left" in done.stderr


def test_a_run_goes_on_when_nobody_reads_its_news(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(live.sys, "stdout", pipe)
        with live.view(spec()) as show:
            os.close(reading)
            for step in range(3):
                show(replace(PICTURE, step=step), ["news"])
        live.print_end(replace(PICTURE, exit_code=0), "/logs")


def test_a_status_is_one_screen_with_incidents_and_the_ledger(capsys):
    live.print_status(replace(PICTURE, hold="disk full"))
    text = capsys.readouterr().out
    assert "run llama: training, step 41 of 100, generation 3, epoch 2" in text
    assert "3 of 5 places filled, newest checkpoint 40, metrics http://127.0.0.1:1/metrics" in text
    assert "HOLD: nothing is decided until the journal can be written: disk full" in text
    assert "\nactive: n1, n2 (suspect)\nspare: n3\nquarantined: n5\n" in text
    assert (
        "checkpoints: 10 damaged, 20 verified (pinned), 40 committed in doubt; 40 is being read back\n"
        "checkpoint 10 is damaged, says n1 and n3: rank-00000.bin: block 3\n"
        "checkpoint 40 is in doubt, says n1: block 9\n"
        "node n1 computes more slowly than its peers\n"
        "node n2 has misread checkpoint 20, which n1 found whole afterwards: block 7\n"
    ) in text
    (row,) = [line for line in text.splitlines() if line.startswith("│ 1")]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:5] == ["1", "100.0 s", "signal: signal 9", "n2", "replace"]
    assert cells[5:] == ["0.25 s", "1.50 s", "0.50 s", "0.75 s", "3.00 s", "2 steps"]
    for n, (label, meaning) in enumerate(LABELS.items()):
        shown = [line for line in text.splitlines() if label in line and meaning[:20] in line]
        assert len(shown) == (n > 0), "labels with no time are left out"
    assert "places x wall-clock" in text


def test_a_picture_without_anything_yet_can_be_printed(capsys):
    live.print_status(replace(PICTURE, incidents=(), owed_us=0, newest_checkpoint=None, loss=None, tokens_per_s=None))
    assert "newest checkpoint none" in capsys.readouterr().out


def test_of_many_nodes_the_first_are_named(capsys):
    mesh = tuple(f"m{n}" for n in range(2000))
    live.print_status(replace(PICTURE, mesh=mesh, nodes=dict.fromkeys(mesh, "active"), standings={}))
    assert "\nactive: m0, m1, m2," in (text := capsys.readouterr().out) and "m15 and 1984 more\n" in text


def test_what_a_program_says_of_itself_is_no_markup(capsys):
    """Rich would raise on a closing tag that nothing has opened, and a run's verdict would be lost with it."""
    hurt = replace(INCIDENT, cause="exception", detail="KeyError: [/data/a]")
    live.print_status(replace(PICTURE, incidents=(hurt,), hold="no [/mnt/run]"))
    text = capsys.readouterr().out
    assert "[/data/a]" in text and "no [/mnt/run]" in text


def test_the_interval_between_checkpoints_is_shown_with_its_reason(capsys):
    live.print_status(PICTURE)
    assert "a checkpoint each 20 steps: Young and Daly want 20" in capsys.readouterr().out
    live.print_status(replace(PICTURE, save_every_why=""))
    assert "a checkpoint each 20 steps, as the job says" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("picture", "said", "unsaid"),
    [
        (
            replace(PICTURE, ended=True, exit_code=0, verdict="all 100 steps done"),
            ["all 100 steps done"],
            ["traceback"],
        ),
        (
            replace(
                PICTURE,
                exit_code=93,
                verdict="the program's own fault",
                tracebacks={"g1-r0": "old", "g3-r1": "KeyError: 7"},
            ),
            ["the program's own fault", "traceback (g3-r1):", "KeyError: 7", "logs of this node: /logs/llama"],
            ["old"],
        ),
        (
            replace(
                PICTURE, exit_code=96, verdict="stopped by the driver at step 41", tracebacks={"g1-r0": "KeyError"}
            ),
            ["stopped by the driver at step 41"],
            ["KeyError"],
        ),
        (
            replace(PICTURE, failure="JournalError: damaged"),
            ["JournalError: damaged", "logs of this node"],
            ["no verdict"],
        ),
    ],
)
def test_the_end_says_what_became_of_the_run(capsys, picture, said, unsaid):
    live.print_end(picture, "/logs/llama")
    text = capsys.readouterr().out
    assert all(part in text for part in said), text
    assert not any(part in text for part in unsaid), text
    assert INCIDENT.detail in text
