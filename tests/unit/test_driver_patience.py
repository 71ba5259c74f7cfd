"""How long a driver waits for a controller that does not answer."""

import logging
import os
import signal
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError

from orchestrator.runtime import driver

STATUS = SimpleNamespace(ended=True)


class Silence:
    """A controller that answers from `until_s` on, by a clock that each look at it moves by ten seconds."""

    def __init__(self, until_s: float = float("inf"), known: bool = True, signals_at: tuple[float, ...] = ()) -> None:
        self.now, self.until_s, self.known, self.signals = 0.0, until_s, known, list(signals_at)
        self.stops: list[bool] = []

    def _look(self) -> None:
        self.now += 10.0
        while self.signals and self.now >= self.signals[0]:
            del self.signals[0]
            os.kill(os.getpid(), signal.SIGINT)
        if self.now < self.until_s:
            raise GetTimeoutError("Get timed out: some object(s) not ready.")

    def poll(self, controller, noticed=0, lease=False):
        self._look()
        return STATUS, []

    def stop(self, controller, token, by, graceful):
        self._look()
        self.stops.append(graceful)

    def find(self, run):
        if not self.known:
            raise driver.RunError(f"no run {run!r} is active on this cluster")
        return SimpleNamespace()


def follow(monkeypatch, silence, head=lambda: True):
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: silence.now))
    for name in ("poll", "stop", "find"):
        monkeypatch.setattr(driver, name, getattr(silence, name))
    monkeypatch.setattr(driver, "_head_answers", head)
    monkeypatch.setattr(driver, "POLL_INTERVAL_S", 0.0)
    return driver.follow("quiet", SimpleNamespace(), "token", lambda status, lines: None)


def test_a_controller_that_ray_is_slow_to_make_is_waited_for_and_that_is_said(monkeypatch, caplog):
    """Ray's head knocks at an address where nobody was after a pause of up to 120 s and a fifth."""
    with caplog.at_level(logging.WARNING):
        assert follow(monkeypatch, Silence(until_s=150.0)) is STATUS
    (line,) = caplog.messages
    assert line == "the controller has not answered for 20 s, and Ray has it: it is waited for, 160 s more"


def test_a_controller_that_never_answers_is_given_up(monkeypatch):
    silence = Silence()
    with pytest.raises(driver.ControllerLost, match=r"for 190 s, and Ray has it: Get timed out"):
        follow(monkeypatch, silence)
    assert silence.now == 190.0


def test_one_that_ray_knows_no_more_is_given_up_sooner(monkeypatch):
    with pytest.raises(driver.ControllerLost, match=r"for 70 s, and Ray knows it no more"):
        follow(monkeypatch, Silence(known=False))


def test_while_the_head_is_away_nobody_is_given_up(monkeypatch):
    silence = Silence(until_s=1000.0, known=False)
    assert follow(monkeypatch, silence, head=lambda: silence.now > 950.0) is STATUS


def test_who_interrupts_twice_does_not_wait_for_a_silent_controller(monkeypatch):
    silence = Silence(signals_at=(30.0, 60.0))
    with pytest.raises(driver.ControllerLost, match=r"for 60 s, and Ray has it"):
        follow(monkeypatch, silence)
    assert silence.stops == []


def begun(monkeypatch, answers):
    """`begun` of a controller that gives these answers, one after the other."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + 10.0))
    monkeypatch.setattr(driver, "time", clock)

    def poll(controller, noticed=0, lease=False):
        assert lease
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer, []

    monkeypatch.setattr(driver, "poll", poll)
    monkeypatch.setattr(driver, "find", lambda run: SimpleNamespace())
    monkeypatch.setattr(driver, "_head_answers", lambda: True)
    return driver.begun("quiet", SimpleNamespace())


def picture(port, hold="", failure=""):
    return SimpleNamespace(metrics_address=f"127.0.0.1:{port}", hold=hold, failure=failure)


def test_a_detached_run_has_begun_when_its_controller_is_at_work(monkeypatch):
    at_work = picture(9100)
    late = GetTimeoutError("Get timed out: some object(s) not ready.")
    assert begun(monkeypatch, [late, picture(0), picture(0), at_work]) is at_work
    for told in (picture(0, hold="disk full"), picture(0, failure="OSError: the port is taken")):
        assert begun(monkeypatch, [picture(0), told]) is told
    slow = picture(0)
    assert begun(monkeypatch, [slow]) is slow, "a journal that takes minutes to read is no failure"
    with pytest.raises(driver.ControllerLost):
        begun(monkeypatch, [late])
