"""The worker process through its socket: assignments, restores, stops, and every way to end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parallel_pool import CONTEXT, share_one_gpu
from rank_sessions import DEVICE, SeededTokens, config_of, order_of
from torch import distributed
from torch.distributed.pipelining._backward import stage_backward

from storage.commits import create_commit
from storage.durable import CheckpointFailed
from storage.manifest import Commit, ManifestError, RankPart
from storage.urls import StoreError
from trainer import contract, worker
from trainer.audit import PeerStateError, StateCorruptError, StateDivergedError
from trainer.contract import ParallelConfig, Receiver, Restore, WorkerConfig, send
from trainer.loop import NonFiniteError

# A world of two is up in about 2 s on one core; the rest is for a loaded machine.
DEADLINE_S = 180.0

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Process:
    """One worker, as its agent sees it."""

    process: Any
    sock: socket.socket
    receiver: Receiver = field(default_factory=lambda: Receiver(contract.FromWorker))
    messages: list[Any] = field(default_factory=list)

    def read_until(self, wanted: Callable[[Any], bool] | None = None) -> None:
        """Collect messages until one is `wanted`, or the worker hangs up."""
        self.sock.settimeout(DEADLINE_S)
        with contextlib.suppress(ConnectionResetError):
            while data := self.sock.recv(65536):
                new = self.receiver.feed(data)
                self.messages += [message for message in new if not isinstance(message, contract.Pulse)]
                if wanted is not None and any(wanted(message) for message in new):
                    return

    def exit_code(self) -> int:
        self.process.join(DEADLINE_S)
        assert self.process.exitcode is not None, "the worker did not exit"
        return int(self.process.exitcode)

    def of_type(self, kind: type) -> list[Any]:
        return [message for message in self.messages if isinstance(message, kind)]


def serve(sock: socket.socket, config: WorkerConfig, poisoned: bool, prepare: Callable[[], None]) -> None:
    def open_dataset(*_: Any) -> SeededTokens:
        if poisoned:
            raise FileNotFoundError("no tokens here")
        return SeededTokens(config)

    worker.open_dataset = open_dataset  # type: ignore[assignment]
    if config.device == "cuda":
        share_one_gpu()
    prepare()
    os._exit(worker.main(sock))


def nothing() -> None:
    pass


def spawn(config: WorkerConfig, poisoned: bool = False, prepare: Callable[[], None] = nothing) -> Process:
    """`prepare` is called in the worker's process before it serves."""
    ours, theirs = socket.socketpair()
    process = CONTEXT.Process(target=serve, args=(theirs, config, poisoned, prepare), daemon=True)
    process.start()
    theirs.close()
    return Process(process, ours)


def assign(
    process: Process,
    rank: int,
    config: WorkerConfig,
    folder: Path,
    restore: Restore,
    store_port: int,
    generation: int,
    **changes: Any,
) -> None:
    order = order_of(
        replace(config, url=str(folder / "run")),
        generation=generation,
        rank=rank,
        local_rank=rank if DEVICE == "cpu" else 0,
        store_port=store_port,
        restore=restore,
        ram_dir=str(folder / "ram"),
    )
    send(process.sock, replace(order, **changes))


@contextlib.contextmanager
def workers(
    config: WorkerConfig,
    folder: Path,
    restore: Restore,
    *,
    generation: int = 1,
    poisoned: bool = False,
    prepare: Callable[[], None] = nothing,
    **changes: Any,
) -> Iterator[list[Process]]:
    """The workers of a generation, each with its assignment."""
    os.environ["OMP_NUM_THREADS"] = "1"
    config = replace(config, url=str(folder / "run"))
    world_size = config.parallel.world_size
    store = distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE_S)
    )
    group: list[Process] = []
    try:
        for rank in range(world_size):
            group.append(spawn(config, poisoned, prepare))
            assign(group[rank], rank, config, folder, restore, store.port, generation, **changes)
        yield group
    finally:
        for member in group:
            member.process.kill()
            member.process.join(DEADLINE_S)
            member.sock.close()


def run_to_the_end(*arguments: Any, **options: Any) -> list[Process]:
    with workers(*arguments, **options) as group:
        for member in group:
            member.read_until()
        assert [member.exit_code() for member in group] == [contract.EXIT_FINISHED] * len(group)
        return group


PAIR = config_of(
    ParallelConfig(dp_shard=2),
    steps=6,
    validation_interval_steps=6,
    checkpoint=contract.CheckpointConfig(interval_steps=3),
)
INIT = Restore(source="init")


def numbers(process: Process) -> dict[int, tuple[float, float]]:
    return {message.step: (message.loss, message.grad_norm) for message in process.of_type(contract.StepDone)}


def test_a_run_continues_with_the_same_numbers_from_memory_and_from_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "ram").mkdir()
    first = run_to_the_end(PAIR, tmp_path, INIT)
    kinds = [type(message).__name__ for message in first[0].messages]
    assert kinds[:8] == ["Phase", "Phase", "Phase", "Restored", "Phase", "Phase", "Validated", "Phase"]
    assert kinds.count("StepDone") == 6
    assert kinds[-1] == "Finished"
    done = [(message.step, message.snapshot_step) for message in first[1].of_type(contract.StepDone)]
    assert all(newest in (step - 1, step) for step, newest in done), "complete before the next step's exchange"
    assert [message.loss for message in first[1].of_type(contract.StepDone)] == [None] * 6
    (restored,) = first[0].of_type(contract.Restored)
    assert restored.step == 0
    assert restored.versions["torch"] == torch.__version__
    assert min(restored.rendezvous_us, restored.build_us, restored.restore_us) > 0

    from_memory = run_to_the_end(PAIR, tmp_path, Restore(source="ram", step=5, generation=1), generation=2)
    assert numbers(from_memory[0]) == {6: numbers(first[0])[6]}

    commit = Commit(
        run=PAIR.run,
        step=3,
        epoch=1,
        generation=1,
        mesh={"pp": 1, "dp_replicate": 1, "dp_shard": 2, "tp": 1},
        parts=tuple(RankPart(**member.of_type(contract.ShardWritten)[0].part) for member in first),
        versions=restored.versions,
    )
    url = str(tmp_path / "run")
    create_commit(url, commit)
    durable = Restore(source="durable", step=3, commit="checkpoints/commits/step-00000003.json")
    from_checkpoint = run_to_the_end(PAIR, tmp_path, durable, generation=3)
    expected = numbers(first[0])
    assert numbers(from_checkpoint[0]) == {step: expected[step] for step in (4, 5, 6)}


def test_a_stop_that_one_worker_hears_ends_all_at_one_step_with_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "ram").mkdir()
    with workers(replace(PAIR, steps=100_000), tmp_path, INIT) as group:
        group[1].read_until(lambda message: isinstance(message, contract.StepDone))
        send(group[1].sock, contract.Stop())
        for member in group:
            member.read_until()
        assert [member.exit_code() for member in group] == [0, 0]
    ends = [member.messages[-1] for member in group]
    assert {(end.step, end.reason) for end in ends} == {(ends[0].step, "stopped")}
    assert all(member.of_type(contract.ShardWritten)[-1].step == ends[0].step for member in group)


def test_an_interval_that_rank_0_hears_is_every_workers(tmp_path: Path) -> None:
    (tmp_path / "ram").mkdir()
    rare = replace(PAIR, steps=100_000, checkpoint=contract.CheckpointConfig(interval_steps=100_000))
    with workers(rare, tmp_path, INIT) as group:
        group[1].read_until(lambda message: isinstance(message, contract.StepDone))
        send(group[0].sock, contract.SaveEvery(steps=4))
        group[1].read_until(lambda message: isinstance(message, contract.ShardWritten))
        send(group[0].sock, contract.Stop())
        for member in group:
            member.read_until()
        assert [member.exit_code() for member in group] == [0, 0]
    (saved, others) = ([m.step for m in member.of_type(contract.ShardWritten)] for member in group)
    assert saved == others and len(saved) >= 2
    assert all(step % 4 == 0 for step in saved[:-1])


def test_workers_leave_with_their_agent(tmp_path: Path) -> None:
    (tmp_path / "ram").mkdir()
    with workers(replace(PAIR, steps=100_000), tmp_path, INIT) as group:
        group[0].read_until(lambda message: isinstance(message, contract.StepDone))
        for member in group:
            member.sock.close()
        assert [member.exit_code() for member in group] == [contract.EXIT_AGENT_GONE] * 2


def test_a_lost_peer_is_reported_as_a_broken_collective_and_the_survivor_parks(tmp_path: Path) -> None:
    (tmp_path / "ram").mkdir()
    with workers(replace(PAIR, steps=100_000), tmp_path, INIT) as group:
        group[0].read_until(lambda message: isinstance(message, contract.StepDone))
        os.kill(group[1].process.pid, signal.SIGKILL)
        killed = time.monotonic()
        group[0].read_until(lambda message: isinstance(message, contract.Parked))
        assert time.monotonic() - killed < PAIR.collective_timeout_s / 2, "it waited for the timeout"
        assert group[0].process.is_alive()
    (failed,) = group[0].of_type(contract.Failed)
    assert failed.kind == "collective", failed.traceback
    assert failed.step == group[0].of_type(contract.StepDone)[-1].step
    assert "\n" not in failed.error
    assert "train_step" in failed.traceback


@pytest.mark.parametrize(
    ("options", "kind", "error"),
    [
        ({"restore": Restore(source="ram", step=4)}, "state", "ManifestError: .*step 4"),
        ({"poisoned": True}, "exception", "FileNotFoundError: no tokens here"),
        ({"world_size": 3}, "exception", "ValueError: assigned world_size 3 is not .* 1"),
    ],
    ids=["no-snapshot", "no-data", "wrong-world"],
)
def test_what_cannot_start_says_why(tmp_path: Path, options: dict[str, Any], kind: str, error: str) -> None:
    (tmp_path / "ram").mkdir()
    with workers(config_of(steps=2), tmp_path, **{"restore": INIT, **options}) as (member,):
        member.read_until()
        assert member.exit_code() == contract.EXIT_FAILED
    (failed,) = member.of_type(contract.Failed)
    assert failed.kind == kind
    assert re.match(error, failed.error), failed.error


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NonFiniteError("step 3: loss nan"), "audit"),
        (StateCorruptError("state changed at rest: model/norm.weight from 0 to 1"), "corrupt"),
        (StateDivergedError("replicas differ: rank 0 a, rank 1 b"), "diverged"),
        (PeerStateError("the audit of state stopped all ranks"), "unclean"),
        (ManifestError("block 7 is damaged"), "state"),
        (CheckpointFailed("rank 3: StoreError('Connection refused')"), "store"),
        (StoreError("503 slow down"), "store"),
        (MemoryError(), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), "memory"),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), "collective"),
        (distributed.DistNetworkError("The client socket has timed out"), "collective"),
        (raised_from(RuntimeError("failed to run forward"), RuntimeError("gloo: Broken pipe")), "collective"),
        (raised_from(RuntimeError("failed to run forward"), IndexError("index out of range")), "exception"),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), "exception"),
        (ValueError("Connection refused"), "exception"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_failures_are_told_apart(error: Exception, kind: str) -> None:
    assert worker.failure_kind(error) == kind


def raised(error: Exception) -> Exception:
    """With a traceback."""
    try:
        raise error
    except Exception as e:
        return e


class Broken(torch.autograd.Function):
    """Has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise LookupError("no such row")


def test_what_fails_in_a_pipeline_stage_is_named_and_not_the_stages_tensors() -> None:
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError, match="Failed to run stage backward") as caught:
        stage_backward((Broken.apply(x),), (torch.ones(1),), [x])
    said: list[Any] = []
    order = SimpleNamespace(generation=1, rank=1)
    worker.tell_failure(SimpleNamespace(emit=said.append), order, 5, caught.value, "exception")  # type: ignore[arg-type]
    assert said[0].error == "LookupError: no such row"
    assert "Failed to run stage backward" in said[0].traceback


@pytest.mark.parametrize(
    ("error", "sources"),
    [(StateCorruptError("rank 1"), False), (PeerStateError("stopped"), False), (LookupError("no"), True)],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_last_words_are_logged_and_told_and_of_the_audit_without_reading_sources(
    monkeypatch: pytest.MonkeyPatch, error: Exception, sources: bool
) -> None:
    """A halt is on its way to a rank whose state is corrupt as soon as another one has said so."""
    said: list[Any] = []
    agent = SimpleNamespace(emit=said.append)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=said.append, flush=lambda: None))
    order, failed = SimpleNamespace(generation=1, rank=1), raised(error)
    worker.tell_failure(agent, order, 5, failed, worker.failure_kind(failed))  # type: ignore[arg-type]
    log, word = said
    assert word.traceback == log and str(error) in log
    assert ("Traceback" in log) == sources


@pytest.mark.parametrize("shift", range(0, 40, 3))
def test_last_words_are_cut_to_the_messages_begin_and_the_tracebacks_end_and_no_secret_is(
    monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    """Wherever the cut is in a URL."""
    said: list[Any] = []
    url = "s3://key:hush-hush@host/path"
    to_begin = worker.ERROR_CHARS - len("LookupError: begin ") - shift
    to_end = worker.TRACEBACK_CHARS - len("end\n") - shift
    message = f"begin {'x' * to_begin} {url} {'y' * (to_end - 1)} end"
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=lambda text: None, flush=lambda: None))
    agent, order = SimpleNamespace(emit=said.append), SimpleNamespace(generation=1, rank=1)
    worker.tell_failure(agent, order, 5, LookupError(message), "exception")  # type: ignore[arg-type]
    (word,) = said
    assert len(word.error) == worker.ERROR_CHARS and word.error.startswith("LookupError: begin x")
    assert len(word.traceback) == worker.TRACEBACK_CHARS and word.traceback.endswith(" end\n")
    assert "hush" not in word.error + word.traceback


def test_the_loopback_interface_is_found_by_its_address() -> None:
    name = worker.interface_towards("127.0.0.1", 12345)
    assert name in {interface for _, interface in socket.if_nameindex()}
    assert name.startswith("lo")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux shows them")
def test_importing_the_worker_leaves_one_thread_so_that_it_can_be_forked() -> None:
    code = (
        "import os, trainer.worker as w, torch;"
        "print(len(os.listdir('/proc/self/task')), w.distributed.is_initialized(), torch.cuda.is_initialized())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.stdout.split() == ["1", "False", "False"], done.stdout + done.stderr


def test_a_worker_started_as_a_program_serves_its_descriptor() -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", "trainer.worker", "--fd", str(theirs.fileno())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        ours.close()
        assert process.wait(DEADLINE_S) == contract.EXIT_AGENT_GONE
