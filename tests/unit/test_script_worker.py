"""A script's worker process through its socket: what the script finds, and every way in which it ends."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from parallel_pool import CONTEXT
from rank_sessions import order_of

from orchestrator.spec import parse
from trainer import contract, script
from trainer.contract import Receiver, send

DEADLINE_S = 60.0


def serve(sock: socket.socket, out: str) -> None:
    with open(out, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = script.main(sock)
    os.write(1, b"returned\n")
    os._exit(code)


class Worker:
    def __init__(self, sock: socket.socket, process: Any, out: Path) -> None:
        self.sock, self.process, self._out = sock, process, out
        self.messages: list[Any] = []
        self._receiver = Receiver(contract.FromWorker)
        sock.settimeout(DEADLINE_S)

    def read_until(self, wanted: Callable[[Any], bool] = lambda message: False) -> None:
        """Until a message is `wanted`, or the worker hangs up."""
        while not any(map(wanted, self.messages)):
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:
                return
            if not data:
                return
            self.messages += self._receiver.feed(data)

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.messages if isinstance(message, kind)]

    def exit_code(self) -> int:
        self.read_until()
        self.process.join(DEADLINE_S)
        return int(self.process.exitcode)

    @property
    def output(self) -> str:
        return self._out.read_text()


@contextmanager
def worker(folder: Path, text: str, *arguments: str, command: list[str] | None = None) -> Iterator[Worker]:
    """A worker that runs `text`, assigned as the only rank of a run."""
    (folder / "code").mkdir(exist_ok=True)
    (folder / "code" / "own.py").write_text(text)
    document = {
        "run": {"name": "own", "url": str(folder / "run")},
        "script": {"command": command or ["python", "code/own.py", *arguments], "folder": str(folder)},
    }
    config = parse(document).worker_config
    order = order_of(config, generation=3, node="a", store_port=9, ram_dir=str(folder / "ram"))
    ours, theirs = socket.socketpair()
    process = CONTEXT.Process(target=serve, args=(theirs, str(folder / "out")), daemon=True)
    process.start()
    theirs.close()
    try:
        send(ours, order)
        yield Worker(ours, process, folder / "out")
    finally:
        process.kill()
        process.join(10)
        ours.close()


def test_a_script_finds_what_python_gives_it(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "helper.py").write_text("WORD = 'beside'")
    text = """
import atexit, os, sys, threading, time
import helper, shepherd
class Here: pass
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("a thread's end")), daemon=False).start()
print([__name__, sys.argv, os.getcwd(), __file__, helper.WORD, sys.modules["__main__"].Here is Here])
print("managed", shepherd.session().is_managed, threading.current_thread() is threading.main_thread())
"""
    with worker(tmp_path, text, "--lr", "1e-3") as process:
        assert process.exit_code() == contract.EXIT_FINISHED
    lines = process.output.splitlines()
    here, file = str(tmp_path), str(tmp_path / "code" / "own.py")
    assert lines[0] == str(["__main__", [file, "--lr", "1e-3"], here, file, "beside", True])
    assert lines[1:] == ["managed True True", "a thread's end", "at exit", "returned"]
    (restored,) = process.of(contract.Restored)
    assert (restored.generation, restored.step, restored.source) == (3, 0, "init")
    assert {"torch", "threads"} <= set(restored.versions) and "dtype" not in restored.versions
    (finished,) = process.of(contract.Finished)
    assert (finished.step, finished.reason) == (1, "completed"), "all of it is one step"
    assert process.of(contract.StepDone) == [] and process.of(contract.Failed) == []
    assert [phase.phase for phase in process.of(contract.Phase)] == ["build"], "nobody judges how long it takes"


def test_the_script_stays_the_main_module_to_its_end(tmp_path: Path) -> None:
    text = """
import atexit, pickle, threading, time
class Config:
    lr: float
def late():
    time.sleep(0.2)
    print("late", pickle.loads(pickle.dumps(Config())).__class__ is Config)
threading.Thread(target=late, daemon=False).start()
atexit.register(lambda: print("exit", pickle.loads(pickle.dumps(Config())).__class__ is Config))
print(Config.__annotations__)
"""
    with worker(tmp_path, text) as process:
        assert process.exit_code() == contract.EXIT_FINISHED
    told = ["{'lr': <class 'float'>}", "late True", "exit True", "returned"]
    assert process.output.splitlines() == told, "and no future statement of ours is its own"
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "main.py").write_text(text)
    command = ["python", "-m", "second.main"]
    with worker(tmp_path, "", command=command) as process:
        assert process.exit_code() == contract.EXIT_FINISHED
    assert process.output.splitlines()[-4:] == told


def test_each_process_draws_its_own_numbers(tmp_path: Path) -> None:
    drawn = set()
    for _ in range(2):
        text = "import numpy, random, torch; print('drawn', numpy.random.rand(), random.random(), torch.rand(1).item())"
        with worker(tmp_path, text) as process:
            assert process.exit_code() == 0
        drawn |= {word for line in process.output.splitlines() for word in line.split() if line.startswith("drawn")}
    assert len(drawn) == 1 + 6


def test_what_c_has_printed_is_written_out(tmp_path: Path) -> None:
    text = "import ctypes; ctypes.CDLL(None).printf(b'from C\\n')"
    with worker(tmp_path, text) as process:
        assert process.exit_code() == 0
    assert "from C" in process.output.splitlines()


def test_a_module_is_run_by_its_name(tmp_path: Path) -> None:
    command = ["python3", "-m", "code_of_mine.train", "--x"]
    (tmp_path / "code_of_mine").mkdir()
    (tmp_path / "code_of_mine" / "__init__.py").touch()
    (tmp_path / "code_of_mine" / "train.py").write_text("import sys; print(__name__, __package__, sys.argv[1:])")
    with worker(tmp_path, "", command=command) as process:
        assert process.exit_code() == 0
    assert process.output.splitlines()[0] == "__main__ code_of_mine ['--x']"


@pytest.mark.parametrize(
    ("text", "kind", "error"),
    [
        ("def f():\n  raise KeyError('lr')\nf()", "exception", "KeyError: 'lr'"),
        ("import sys; sys.exit(3)", "exception", "ScriptExit: the script has ended with exit code 3"),
        ("import sys; sys.exit('no data')", "exception", "ScriptExit: the script has ended: no data"),
        ("raise RuntimeError('Connection closed by peer [1.2.3.4]')", "collective", "RuntimeError: Connection closed"),
        ("raise RuntimeError('CUDA out of memory')", "memory", "RuntimeError: CUDA out of memory"),
        ("import nothing_of_that_name", "exception", "ModuleNotFoundError: No module named"),
        ("this is no Python", "exception", "SyntaxError: invalid syntax"),
    ],
)
def test_a_failure_is_told_with_the_scripts_own_traceback(tmp_path: Path, text: str, kind: str, error: str) -> None:
    with worker(tmp_path, text) as process:
        assert process.exit_code() == contract.EXIT_FAILED
    (failed,) = process.of(contract.Failed)
    assert (failed.kind, failed.error[: len(error)]) == (kind, error)
    frames = [line.strip() for line in failed.traceback.splitlines() if line.startswith("  File")]
    assert not any("trainer/script.py" in line for line in frames)
    if error.startswith("KeyError"):
        assert frames[0] == f'File "{tmp_path}/code/own.py", line 3, in <module>'
    assert failed.traceback.strip() in process.output
    assert process.of(contract.Finished) == []


def test_a_good_exit_is_the_end_of_the_run(tmp_path: Path) -> None:
    with worker(tmp_path, "import sys; sys.exit(0)") as process:
        assert process.exit_code() == 0
    assert [finished.reason for finished in process.of(contract.Finished)] == ["completed"]


@pytest.mark.parametrize("end", ["", "raise KeyError(3)"])
def test_what_a_script_has_left_open_is_written_out(tmp_path: Path, end: str) -> None:
    text = "log = open('log.csv', 'w')\ndef told():\n    log.write('1,2\\n')\ntold()\n"
    with worker(tmp_path, text + end) as process:
        assert process.exit_code() == (contract.EXIT_FAILED if end else contract.EXIT_FINISHED)
    assert (tmp_path / "log.csv").read_text() == "1,2\n"


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("raise KeyError(3)", 1), ("pass", 0)])
def test_a_child_that_a_script_has_forked_does_not_speak_for_it(tmp_path: Path, end: str, code: int) -> None:
    text = f"import os, sys\npid = os.fork()\nif not pid:\n    {end}\nelse:\n    status = os.waitpid(pid, 0)[1]\n"
    text += "    print('child', os.waitstatus_to_exitcode(status))\n"
    with worker(tmp_path, text) as process:
        assert process.exit_code() == contract.EXIT_FINISHED
    assert f"child {code}" in process.output.splitlines()
    assert len(process.of(contract.Finished)) == 1 and process.of(contract.Failed) == []


def test_a_script_without_snapshots_is_stopped_by_sigterm(tmp_path: Path) -> None:
    with worker(tmp_path, "import time; print('up'); time.sleep(100)") as process:
        process.read_until(lambda message: isinstance(message, contract.Restored))
        send(process.sock, contract.Stop())
        assert process.exit_code() == -signal.SIGTERM
    assert process.of(contract.Finished) == []


def test_a_script_that_minds_sigterm_ends_in_good_order(tmp_path: Path) -> None:
    text = """
import signal, sys, time
import shepherd
def end(*_):
    print("saved by itself"); sys.exit(0)
signal.signal(signal.SIGTERM, end)
shepherd.session().step(5)
while True: time.sleep(0.01)
"""
    with worker(tmp_path, text) as process:
        process.read_until(lambda message: isinstance(message, contract.StepDone))
        send(process.sock, contract.Stop())
        assert process.exit_code() == 0
    assert "saved by itself" in process.output
    (finished,) = process.of(contract.Finished)
    assert (finished.step, finished.reason) == (5, "stopped")


def test_a_script_that_keeps_snapshots_is_stopped_with_a_checkpoint(tmp_path: Path) -> None:
    text = """
import torch, shepherd
session, state = shepherd.session(), {"t": torch.zeros(3)}
step = session.restore(state) or 0
while True:
    step += 1
    session.snapshot(step, state)
    session.step(step)
"""
    with worker(tmp_path, text) as process:
        process.read_until(lambda message: isinstance(message, contract.StepDone) and message.step >= 3)
        send(process.sock, contract.Stop())
        assert process.exit_code() == 0
    (finished,) = process.of(contract.Finished)
    assert finished.reason == "stopped"
    assert [written.step for written in process.of(contract.ShardWritten)][-1] == finished.step
