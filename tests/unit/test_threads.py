"""Work shared out among threads: results in order, the first error told, and no thread that outlives the process."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from storage.threads import in_threads


def test_results_come_in_the_order_of_items():
    last = threading.Event()

    def work(n: int) -> int:
        if n == 9:
            last.set()
        elif n == 0:
            assert last.wait(60), "the first item is done after the last"
        return n * n

    assert in_threads(work, range(10), 3) == [n * n for n in range(10)]
    assert in_threads(work, [], 3) == []


def test_the_first_error_is_raised_and_ends_the_work():
    begun: list[int] = []

    def work(n: int) -> None:
        begun.append(n)
        raise ValueError(str(n))

    with pytest.raises(ValueError, match=r"\d"):
        in_threads(work, range(1000), 4)
    assert len(begun) <= 4


def test_a_thread_that_hangs_does_not_keep_the_process():
    program = (
        "import threading; from storage.threads import in_threads\n"
        "begun = threading.Event()\n"
        "hang = lambda n: (begun.set(), threading.Event().wait())\n"
        "threading.Thread(target=in_threads, args=(hang, [1], 1), daemon=True).start()\n"
        "assert begun.wait(60)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
