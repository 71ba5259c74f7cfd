"""Harm inside a worker: exactly the bits that are told change, drawn evenly, and the exception reaches the loop."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer import harm, loop
from trainer.contract import Inject, Injected

TOLD = re.compile(r"\[(\d+)\] 0x([0-9a-f]+) to 0x([0-9a-f]+)")


def order(pattern: str = "bit", tensors: str = "", seed: int = 0) -> Inject:
    return Inject(number=7, fault="flip", tensors=tensors, pattern=pattern, seed=seed)  # type: ignore[arg-type]


def state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(1)
    return {
        "model/a": torch.randn(8, 5, generator=made).to(dtype),
        "model/empty": torch.empty(0, dtype=dtype),
        "exp_avg/a": torch.randn(5, 8, generator=made).to(dtype).t(),
        "exp_avg_sq/a": torch.rand(3, generator=made).to(dtype),
    }


def bits(tensor: Tensor) -> list[int]:
    width = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    mask = (1 << 8 * tensor.element_size()) - 1
    return [value & mask for value in tensor.contiguous().view(width).flatten().tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["bit", "run", "zero"])
def test_exactly_what_is_told_has_changed(pattern: str, dtype: torch.dtype) -> None:
    for seed in range(60):
        before, after = state(dtype), state(dtype)
        detail = harm.flip(after, order(pattern, seed=seed))
        name = detail.split(" in ")[1].split()[0]
        told = {int(i): (int(old, 16), int(new, 16)) for i, old, new in TOLD.findall(detail)}
        for other in before:
            changed = {
                i: pair
                for i, pair in enumerate(zip(bits(before[other]), bits(after[other]), strict=True))
                if pair[0] != pair[1]
            }
            assert changed == (told if other == name else {}), detail
        flips = [(old ^ new).bit_count() for old, new in told.values()]
        span = max(told) - min(told) + 1
        if pattern == "bit":
            assert flips == [1]
        elif pattern == "run":
            assert set(flips) == {1} and 2 <= len(told) == span <= 16
        else:
            assert {new for _, new in told.values()} == {0} and len(told) <= span <= 16
        assert detail == harm.flip(state(dtype), order(pattern, seed=seed)), "the seed decides everything"


def test_only_tensors_of_the_kind_asked_for_are_hit() -> None:
    for kind in ("model/", "exp_avg/", "exp_avg_sq/"):
        for seed in range(20):
            assert f" in {kind}" in harm.flip(state(), order(tensors=kind, seed=seed))
    with pytest.raises(ValueError, match="begins with 'grad/'"):
        harm.flip(state(), order(tensors="grad/"))


def test_elements_and_bits_are_drawn_evenly() -> None:
    draws = 4000
    hits: dict[tuple[str, int], int] = {}
    places = [0] * 32
    for seed in range(draws):
        detail = harm.flip(state(), order(seed=seed))
        ((index, old, new),) = TOLD.findall(detail)
        key = (detail.split(" in ")[1].split()[0], int(index))
        hits[key] = hits.get(key, 0) + 1
        places[(int(old, 16) ^ int(new, 16)).bit_length() - 1] += 1
    assert len(hits) == 83
    for counts in (list(hits.values()), places):
        mean = draws / len(counts)
        chi2 = sum((c - mean) ** 2 / mean for c in counts)
        assert chi2 < len(counts) - 1 + 5 * (2 * (len(counts) - 1)) ** 0.5, counts  # 5 sigma


def test_zeroing_zeros_has_no_effect_and_says_so() -> None:
    zeros = {"exp_avg/a": torch.zeros(100)}
    assert harm.flip(zeros, order("zero")).startswith("no effect")
    nearly = {"exp_avg/a": torch.zeros(100)}
    nearly["exp_avg/a"][63] = 2.0
    assert "[63] 0x40000000 to 0x0" in harm.flip(nearly, order("zero"))
    assert not nearly["exp_avg/a"].any()


def test_autograd_does_not_see_the_write() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    loss = (parameter * parameter).sum()
    harm.flip({"model/p": parameter.data}, order())
    loss.backward()  # an in-place change that is seen raises here


def session(tensors: dict[str, Tensor]) -> Any:
    return SimpleNamespace(state=SimpleNamespace(step=41, tensors=tensors), at_rest=threading.Lock())


def victim(session_: Any, told: list[Any]) -> harm.Victim:
    return harm.Victim(generation=3, rank=1, step=lambda: 41, url="run", emit=told.append, session=session_)


def test_bits_change_only_while_the_state_is_at_rest() -> None:
    hurt, said = session({"model/p": torch.ones(4)}), []
    hurt.at_rest.acquire()
    thread = threading.Thread(target=harm.obey, args=(order(), victim(hurt, said)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and not said and bool((hurt.state.tensors["model/p"] == 1).all())
    hurt.at_rest.release()
    thread.join(10)
    (told,) = said
    assert (told.generation, told.rank, told.step, told.number) == (3, 1, 41, 7)
    assert isinstance(told, Injected) and not bool((hurt.state.tensors["model/p"] == 1).all())
    assert hurt.at_rest.acquire(timeout=0)


def test_what_cannot_be_done_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    harm.obey(order(), victim(session({}), told))
    assert told[0].detail.startswith("not done: no tensor")
    harm.obey(order(), victim(None, told))
    assert told[1].detail.startswith("not done: where a script has its state")
    busy = session({"model/p": torch.ones(4)})
    monkeypatch.setattr(harm, "AT_REST_DEADLINE_S", 0.01)
    busy.at_rest.acquire()
    harm.obey(order(), victim(busy, told))
    assert told[2].detail.startswith("not done: the state was not at rest")


def test_the_exception_comes_out_of_the_main_threads_own_line() -> None:
    told: list[Any] = []
    deadline = time.monotonic() + 20
    training = threading.Event()

    def obey() -> None:
        assert training.wait(20)
        harm.obey(Inject(number=7, fault="exception"), victim(None, told))

    def train() -> None:
        training.set()
        while time.monotonic() < deadline:
            pass

    thread = threading.Thread(target=obey)
    thread.start()  # in peace: it is Python too, and takes an exception of another thread for a start that failed
    with pytest.raises(harm.InjectedFault, match="fault 7, as ordered") as raised:
        train()
    thread.join(10)
    assert type(raised.value).__name__ == "InjectedFault"
    assert "after step 41" in told[0].detail


def child(harm_of: str) -> subprocess.CompletedProcess[str]:
    """A process that is hurt from a thread beside its main one, as a worker is."""
    program = f"""
import sys, threading, time
from trainer import harm
from trainer.contract import Inject
victim = harm.Victim(
    generation=1, rank=0, step=lambda: 4, url="", emit=lambda m: print(m.detail, file=sys.stderr, flush=True)
)
order = Inject(number=1, fault={harm_of!r}, seconds=-3600)
thread = threading.Thread(target=harm.obey, args=(order, victim), daemon=True)
before, monotonic = time.time(), time.monotonic()
thread.start()
"""
    body = {
        "segfault": "thread.join()",
        "memory": """
try:
    while time.monotonic() < monotonic + 60:
        pass
except MemoryError:
    print("met")
thread.join()
""",
        "clock": """
thread.join()
print(round((time.time() - before) / 60), round((time.time_ns() / 1e9 - before) / 60), time.monotonic() >= monotonic)
""",
    }[harm_of]
    return subprocess.run([sys.executable, "-c", program + body], capture_output=True, text=True, timeout=120)


def test_a_bad_access_ends_the_process_by_its_signal() -> None:
    done = child("segfault")
    assert (done.returncode, "a read of address 0 after step 4" in done.stderr) == (-signal.SIGSEGV, True)


def test_memory_runs_out_and_the_training_thread_is_told() -> None:
    done = child("memory")
    assert (done.returncode, done.stdout) == (0, "met\n"), done.stderr


def test_the_next_batch_is_the_last_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(Exception):
        pass

    def read(*args: object) -> object:
        return "a batch"

    def endless(seconds: float) -> None:
        assert seconds < 1
        raise Endless

    monkeypatch.setattr(loop, "_batch", read)
    monkeypatch.setattr(harm.time, "sleep", endless)
    harm.obey(Inject(number=7, fault="loop"), victim(session({}), []))
    with pytest.raises(Endless) as raised:
        loop._batch(None, None, 0)  # type: ignore[arg-type]
    assert raised.traceback[-2].name == "_loop_for_ever"


def test_the_wall_clock_leaps_and_no_other() -> None:
    done = child("clock")
    assert (done.stdout, "leaps by -3600 s" in done.stderr) == ("-60 -60 True\n", True), done.stderr
