"""The driver's side of a run: start or find its controller, renew the lease, bring news, and end with it."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from orchestrator.observe.status import Status
from orchestrator.runtime.body import CODE_DEADLINE_S
from orchestrator.runtime.controller import Controller, namespace_of
from orchestrator.runtime.nodes import HEAD_RESOURCE, last_line
from orchestrator.runtime.preparation import run_log_dir
from orchestrator.spec import JobSpec

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.5
POLL_DEADLINE_S = 10.0
UPDATE_DEADLINE_S = CODE_DEADLINE_S + POLL_DEADLINE_S
LEASE_INTERVAL_S = 2.0
GONE_AFTER_S = 60.0
"""A controller that Ray knows no more for so long will not come back, if Ray's head does. While the head is away it is
waited for; a driver whose own node gives the head up is ended with it."""
SILENT_AFTER_S = 180.0
"""One that Ray has, but that does not answer for so long. Longer than Ray takes to make it, or to make it again: 60 s
for a process that does not start, before it tries another; as long for a node that stands still, by its defaults; and
its head knocks at an address where nobody was for gRPC's longest pause, 120 s and a fifth."""
SILENCE_TOLD_AFTER_S = 15.0
"""And the people who wait are told."""
HEAD_DEADLINE_S = 2.0
"""For a connection to the head."""
INTERRUPT_GRACE_S = 12.0
"""From Ctrl-C until a run that has not reached its checkpoint is ended at once; all is gone within 30 s."""


class RunError(RuntimeError):
    """There is no such run, or it cannot be reached."""


class ControllerLost(RuntimeError):
    """A run that was under way cannot be followed any more."""


def start(spec: JobSpec, detached: bool) -> tuple[Any, str]:
    """Create the run's controller on the head node; it and the run's token. Needs a connected Ray.

    Raises:
        RunError: the run is active already, or its token cannot be kept here; it was not started then.
    """
    token = secrets.token_hex(32)
    kept = draft_token(spec, token)  # a run without a token here could not be stopped
    options: dict[str, Any] = {
        "name": "controller",
        "namespace": namespace_of(spec.run.name),
        "lifetime": "detached",
        "max_restarts": -1,
        "max_task_retries": 0,
        "num_cpus": 0,
        "max_concurrency": 1000,
        "resources": {HEAD_RESOURCE: 0.001},
    }
    try:
        actor = ray.remote(Controller).options(**options)
        controller: Any = actor.remote(spec_document=spec.document(), token=token, detached=detached)
    except BaseException as e:
        kept.unlink(missing_ok=True)
        if not isinstance(e, ValueError):
            raise
        raise RunError(
            f"run {spec.run.name!r} is active on this cluster: follow it with `shepherd status {spec.run.name}`, "
            f"end it with `shepherd stop {spec.run.name}`, or give run.name another value"
        ) from e
    try:
        os.replace(kept, token_path(spec.cluster.log_dir, spec.run.name))
    except OSError as e:
        ray.kill(controller, no_restart=True)
        raise RunError(f"cluster.log_dir = {spec.cluster.log_dir!r}: the run's token cannot be kept there: {e}") from e
    return controller, token


def find(run: str) -> Any:
    """The controller of an active run. Raises RunError when there is none."""
    try:
        return ray.get_actor("controller", namespace_of(run))
    except ValueError as e:
        raise RunError(f"no run {run!r} is active on this cluster") from e


def poll(controller: Any, noticed: int = 0, lease: bool = False) -> tuple[Status, list[tuple[int, str]]]:
    """One look at the run. Raises ray's own errors when the controller does not answer in time."""
    answer: tuple[Status, list[tuple[int, str]]] = ray.get(
        controller.poll.remote(noticed, lease), timeout=POLL_DEADLINE_S
    )
    return answer


@dataclass
class _Followed:
    """A run and its controller's actor as this driver last found it."""

    run: str
    actor: Any
    heard: float
    """When it last answered."""
    told: bool = False
    """Whether people know that it does not."""

    def seek(self, error: Exception, hurried: bool) -> None:
        """It has not answered but with `error`. After its head was away it is another process at another address, of
        which an old handle need not hear.

        Raises:
            ControllerLost: it has been waited for long enough; `hurried`, that is not long.
        """
        if not _head_answers():
            self.heard = time.monotonic()  # its silence counts from when the head is back
            return
        patience_s, known = SILENT_AFTER_S, "Ray has it"
        try:
            self.actor = find(self.run)
        except RunError:
            patience_s, known = GONE_AFTER_S, "Ray knows it no more"
        except Exception as e:  # Ray is not ready yet
            logger.debug("%r", e)
        silent_s = time.monotonic() - self.heard
        patience_s = SILENCE_TOLD_AFTER_S if hurried else patience_s
        what = f"the controller has not answered for {silent_s:.0f} s, and {known}"
        if silent_s > patience_s:
            raise ControllerLost(f"{what}: {last_line(error)}") from error
        if silent_s > SILENCE_TOLD_AFTER_S and not self.told:
            self.told = True
            logger.warning("%s: it is waited for, %.0f s more", what, patience_s - silent_s)


def begun(run: str, controller: Any) -> Status:
    """Wait until the controller of a run that nobody will follow is at work, holds, or has failed.

    Raises:
        ControllerLost: the controller is gone and does not come back.
    """
    followed, deadline = _Followed(run, controller, heard=time.monotonic()), time.monotonic() + SILENT_AFTER_S
    while True:
        try:
            status, _ = poll(followed.actor, lease=True)  # as a follower's: who has failed need not wait for one
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as e:
            followed.seek(e, hurried=False)
        else:
            followed.heard = time.monotonic()
            serves = not status.metrics_address.endswith(":0")  # which it does once it has read the journal
            if serves or status.hold or status.failure or time.monotonic() > deadline:
                return status
        time.sleep(POLL_INTERVAL_S)


def follow(run: str, controller: Any, token: str, on_news: Callable[[Status, list[str]], None]) -> Status:
    """Stay with the run to its end, as its driver. Ctrl-C (or SIGTERM) asks it to stop, twice ends it at once.

    Raises:
        ControllerLost: the controller is gone and does not come back.
    """
    noticed, followed = 0, _Followed(run, controller, heard=time.monotonic())
    with _interrupts() as interrupts, _lease(followed):
        asked, asked_at = 0, 0.0
        while True:
            if asked == 1 and time.monotonic() - asked_at > INTERRUPT_GRACE_S:
                interrupts.count = 2
            try:
                if interrupts.count > asked:
                    stop(followed.actor, token, by="the driver", graceful=interrupts.count == 1)
                    asked, asked_at = interrupts.count, time.monotonic()
                status, notices = poll(followed.actor, noticed, lease=True)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as e:
                followed.seek(e, hurried=interrupts.count > 1)
                interrupts.wait(POLL_INTERVAL_S)
                continue
            followed.heard, followed.told = time.monotonic(), False
            noticed = notices[-1][0] if notices else noticed
            on_news(status, [line for _, line in notices])
            if status.ended:
                return status
            interrupts.wait(POLL_INTERVAL_S)


def stop(controller: Any, token: str, by: str, graceful: bool) -> None:
    """Ask a run to end. Raises PermissionError when the token is not the job's."""
    with _refused_as_it_was():
        ray.get(controller.stop.remote(token, by, graceful), timeout=POLL_DEADLINE_S)


def drain(controller: Any, token: str, node: str, by: str) -> None:
    """Have a node of a run replaced, and let go. Raises PermissionError for a wrong token, ValueError for the node."""
    with _refused_as_it_was():
        ray.get(controller.drain.remote(token, node, by), timeout=POLL_DEADLINE_S)


def update(controller: Any, token: str, overrides: list[str], code: str | None, by: str) -> list[str]:
    """Have a run go on as another job from its next step boundary on; what changes, a line each. Blocks until every
    node is ready for new code, if there is any.

    Raises:
        PermissionError: the token is not the job's.
        ValueError: the job could not run so, or now is no time for it; nothing has changed.
    """
    with _refused_as_it_was():
        lines: list[str] = ray.get(controller.update.remote(token, overrides, code, by), timeout=UPDATE_DEADLINE_S)
    return lines


def where(controller: Any, token: str) -> str:
    """run.url of an active run. Raises PermissionError when the token is not the job's."""
    with _refused_as_it_was():
        return str(ray.get(controller.where.remote(token), timeout=POLL_DEADLINE_S))


@contextmanager
def _refused_as_it_was() -> Iterator[None]:
    try:
        yield
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, (PermissionError, ValueError)):
            raise e.cause from e
        raise


def draft_token(spec: JobSpec, token: str) -> Path:
    """Keep the run's token where only this user can read it, beside that of a run that may be active.

    Raises:
        RunError: it cannot be kept.
    """
    path = token_path(spec.cluster.log_dir, spec.run.name)
    draft = path.with_name(f".token.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token)
    except OSError as e:
        with suppress(OSError):
            draft.unlink()
        raise RunError(f"cluster.log_dir = {spec.cluster.log_dir!r}: the run's token cannot be kept there: {e}") from e
    return draft


def read_token(log_dir: str, run: str) -> str:
    """The run's token: from SHEPHERD_TOKEN, else from where its driver keeps it.

    Raises:
        RunError: there is none here.
    """
    path = token_path(log_dir, run)
    token = os.environ.get("SHEPHERD_TOKEN", "")
    if not token and path.exists():
        token = path.read_text()
    if not token:
        raise RunError(
            f"the token of run {run!r} is not in {path}: give --log-dir if the run has another cluster.log_dir, or set "
            "SHEPHERD_TOKEN to what is there where the run was started"
        )
    return token


def token_path(log_dir: str, run: str) -> Path:
    return Path(log_dir).expanduser() / run / "token"


class _Interrupts:
    def __init__(self) -> None:
        self.count = 0
        self._event = threading.Event()

    def __call__(self, *_: object) -> None:
        self.count += 1
        self._event.set()

    def wait(self, seconds: float) -> None:
        self._event.wait(seconds)
        self._event.clear()


@contextmanager
def _lease(followed: _Followed) -> Iterator[None]:
    """Renew the lease from a thread: a terminal that stands still must not end the run."""
    done = threading.Event()

    def renew() -> None:
        while not done.wait(LEASE_INTERVAL_S):
            with suppress(Exception):  # the next one, or the follower, meets the same and says so
                ray.get(followed.actor.renew.remote(), timeout=POLL_DEADLINE_S)

    thread = threading.Thread(target=renew, name="driver-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def _head_answers() -> bool:
    """Whether somebody listens where Ray's head is, or was."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_DEADLINE_S):
            return True
    except OSError:
        return False


@contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    """Count SIGINT and SIGTERM instead of dying of them."""
    interrupts = _Interrupts()
    old = {number: signal.signal(number, interrupts) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def connect(address: str | None) -> None:
    """Connect to the Ray cluster: the given one, RAY_ADDRESS, or the one on this machine.

    Raises:
        RunError: there is none, or what is named is not the address of one.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS", "") or "auto"
    if "://" in address or address == "local":
        raise RunError(
            f"--address or RAY_ADDRESS is {address!r}: give the HOST:PORT of the cluster's head (`ray start` tells it, "
            "with port 6379 unless told otherwise), not the address of a dashboard or of Ray's client"
        )
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as e:
        raise RunError(
            f"no Ray cluster answers: start one with `ray start --head`, or name one by --address or RAY_ADDRESS ({e})"
        ) from e
    except Exception as e:  # other versions, another token, an address without a port: Ray has an error for each
        raise RunError(
            f"the Ray cluster {address!r} (--address or RAY_ADDRESS; HOST:PORT) takes no connection: "
            f"{type(e).__name__}: {e}"
        ) from e


__all__ = [
    "ControllerLost",
    "RunError",
    "begun",
    "connect",
    "find",
    "follow",
    "poll",
    "read_token",
    "run_log_dir",
    "start",
    "stop",
    "where",
]
