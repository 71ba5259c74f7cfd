"""A Prometheus beside a run, which keeps what the run's metrics told, so that they can be looked at when it is over.

    with recording(folder, rules, interval_s=1.0) as recorder:
        ...
        recorder.scrape(status.metrics_address)  # again and again: a new controller may have another address

Everything stands in `folder`: configuration, targets, log and data. `prometheus` must be on the PATH.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

READY_DEADLINE_S = 30.0
"""For Prometheus to answer. It takes 0.2 s on an idle machine."""
END_DEADLINE_S = 10.0
"""For Prometheus to write what it has in memory; then it is killed, and its write-ahead log has the rest."""
VIEW_ADDRESS = "127.0.0.1:9091"
"""Where people look at what was kept: beside 9090, where Debian's package starts a Prometheus of its own."""

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl  # found now: between fork and exec nothing may be looked up


class PrometheusError(Exception):
    """Prometheus does not start; the message says why."""


@dataclass(frozen=True)
class Recorder:
    """A Prometheus that runs."""

    folder: Path
    url: str
    """Its HTTP API and page, without a slash at the end."""

    def scrape(self, address: str) -> None:
        """From now on scrape this host:port, and no other. Cheap when nothing has changed."""
        targets = json.dumps([{"targets": [address]}])
        file = self.folder / "targets.json"
        if not file.exists() or file.read_text() != targets:
            _replace(file, targets)


@contextmanager
def recording(folder: Path, rules: Path, interval_s: float) -> Iterator[Recorder]:
    """A Prometheus with its data in `folder`, which scrapes and evaluates `rules` every `interval_s`.

    Raises:
        PrometheusError: it is not installed, or does not start.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise PrometheusError("prometheus is not installed: make setup")
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "prometheus.yml", _configuration(rules.resolve(), interval_s))
    address = f"127.0.0.1:{_free_port()}"
    with open(folder / "prometheus.log", "w") as log:
        process = subprocess.Popen(
            [program, *_arguments(folder, address)], stdout=log, stderr=log, preexec_fn=_die_with_parent
        )
    try:
        _await_ready(process, f"http://{address}", folder / "prometheus.log")
        yield Recorder(folder=folder, url=f"http://{address}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def hint(folder: Path, run: str) -> str:
    """How to look at what `recording` has kept of a run in `folder`, for people, when the run has just ended."""
    command = " ".join(["prometheus", *_arguments(Path(os.path.relpath(folder)), VIEW_ADDRESS)])
    end = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    graphs = {"range_input": "15m", "end_input": end, "tab": "0"}
    page = {
        "g0.expr": f'sum by (label) (rate(shepherd_node_seconds_total{{run="{run}"}}[10s])) > 0',
        "g0.stacked": "1",
        "g1.expr": f'run:shepherd_goodput:ratio{{run="{run}"}}',
        **{f"{graph}.{name}": value for graph in ("g0", "g1") for name, value in graphs.items()},
    }
    return (
        f"The metrics of {run} are kept in {os.path.relpath(folder)}. To look at them, start\n"
        f"    {command}\n"
        "and open, for where the time went and goodput,\n"
        f"    http://{VIEW_ADDRESS}/graph?{urllib.parse.urlencode(page)}\n"
        f"or the dashboard in Grafana, beside that Prometheus: docs/monitoring.md has the one command."
    )


def _configuration(rules: Path, interval_s: float) -> str:
    interval = f"{round(interval_s * 1000)}ms"
    return json.dumps(  # which is YAML, too
        {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
            "rule_files": [str(rules)],
            "scrape_configs": [
                {
                    "job_name": "shepherd",
                    "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": interval}],
                }
            ],
        },
        indent=2,
    )


def _arguments(folder: Path, address: str) -> list[str]:
    return [
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]


def _await_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_DEADLINE_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise PrometheusError(f"prometheus does not start: {''.join(log.read_text().splitlines(True)[-3:])}")
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)


def _free_port() -> int:
    """Below those that Linux gives to whoever asks for any: it has to stay free until Prometheus binds it."""
    for port in random.sample(range(20_000, 30_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise PrometheusError("of 100 ports of this machine between 20000 and 30000 none is free for Prometheus")


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _replace(file: Path, text: str) -> None:
    """At once: Prometheus reads it when it changes."""
    part = file.with_suffix(".part")
    part.write_text(text)
    os.replace(part, file)
