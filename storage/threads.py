"""Work in threads that do not keep the process alive. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def begun(work: Callable[[], R], name: str) -> Future[R]:
    """What `work` will have come to, which is done in a thread of its own; that may be left behind, as a daemon."""
    result: Future[R] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as e:
            result.set_exception(e)

    threading.Thread(target=run, name=name, daemon=True).start()
    return result


def in_threads(function: Callable[[T], R], items: Iterable[T], n_threads: int) -> list[R]:
    """`function` of each item, in the items' order.

    The threads are daemons, unlike those of concurrent.futures: a store or disk that hangs in one must not keep a
    worker from ending. After the first error no other item is begun; it is raised when all threads are done.
    """
    todo, lock = enumerate(items), threading.Lock()
    results: dict[int, R] = {}
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            with lock:
                number, item = next(todo, (-1, None))
            if number < 0:
                return
            try:
                results[number] = function(item)  # type: ignore[arg-type]
            except BaseException as e:
                errors.append(e)

    threads = [threading.Thread(target=work, name="storage", daemon=True) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in sorted(results)]
