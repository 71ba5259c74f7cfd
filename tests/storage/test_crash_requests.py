"""An S3 run directory whose client is killed, or whose server fails, at every request: one complete checkpoint serves.

A proxy before moto's server enumerates the requests of a save, of a commit, of a deletion and of a restore. At each it
kills the client before or after the request took effect, or answers 503 or 409, breaks the connection in the middle of
a body, or loses the answer to what was done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from parallel_pool import CONTEXT
from s3_proxy import Plan, Proxy, s3_proxy
from s3_server import s3_bucket
from spoilt import spoilt
from states import blank, checkpointer, commit_of, same, save, served, state_of, write

from storage import s3
from storage.commits import create_commit, delete_checkpoint, prune, read_commit
from storage.durable import load
from storage.manifest import DATA_DIR, Commit, RankPart
from storage.urls import StoreError, list_folders, scratch_folder

pytestmark = pytest.mark.timeout(900)

OLD, NEW = 5, 6
# Of a client whose answer never comes, so that it is missed within a test. All others get theirs, however busy the
# server: a request that came again would be counted as one more.
READ_TIMEOUT_S = 3.0
CLIENT_S = 180.0


@dataclass
class Act:
    prepare: Callable[[str], Any]
    do: Callable[[str, Any], Any]
    """In the client's process; what it returns is what it tells of its success."""
    check: Callable[[str, Any, Any], None]
    """Of the store, what was prepared, and what was told: an exception, or None of a client that was killed."""


def check_save(url: str, _: Any, told: Any) -> None:
    assert served(url) == [OLD]
    if isinstance(told, RankPart):
        create_commit(url, commit_of([told], NEW, 2))
    else:
        save(url, NEW, generation=3)
    prune(url, NEW)
    assert served(url) == [OLD, NEW]
    assert len(list_folders(url, DATA_DIR)) == 2
    assert not scratch_folder(url, 0).exists(), "nor on the node"


def check_commit(url: str, commit: Commit, told: Any) -> None:
    steps = served(url)
    assert steps == [OLD, NEW] or (steps == [OLD] and told is not True)
    assert create_commit(url, commit)
    assert served(url) == [OLD, NEW]


def delete(url: str, _: Any) -> bool:
    delete_checkpoint(url, OLD)
    prune(url, OLD)
    return True


def check_deletion(url: str, _: Any, told: Any) -> None:
    steps = served(url)
    assert steps == [NEW] or (steps == [OLD, NEW] and told is not True)
    delete(url, _)
    assert served(url) == [NEW]
    assert len(list_folders(url, DATA_DIR)) == 1


def restore(url: str, _: Any) -> bool:
    state = blank()
    try:
        load(url, read_commit(url, OLD), state)
    except Exception:
        assert same(state, blank()) or spoilt(state), "a tensor has changed"
        raise
    assert same(state, state_of(OLD)), "another state was restored"
    return True


def check_restore(url: str, _: Any, told: Any) -> None:
    assert served(url) == [OLD]


def save_in_parts(url: str, _: Any) -> RankPart:
    """As what is larger than one request is saved: a multipart upload, here of three parts, and the index."""
    s3.PART_BYTES = 1 << 16  # in the client's process
    return checkpointer(url, generation=2).save(state_of(NEW))


ACTS = {
    "save": Act(lambda url: None, lambda url, _: checkpointer(url, generation=2).save(state_of(NEW)), check_save),
    "save in parts": Act(lambda url: None, save_in_parts, check_save),
    "commit": Act(lambda url: write(url, NEW), lambda url, commit: create_commit(url, commit), check_commit),
    "deletion": Act(lambda url: save(url, NEW), delete, check_deletion),
    "restore": Act(lambda url: None, restore, check_restore),
}


@dataclass
class Bench:
    bucket: str
    proxy: Proxy
    runs: int = 0


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with s3_bucket() as bucket, pytest.MonkeyPatch.context() as patch:
        patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)  # AWS and moto want 5 MiB
        server = urlsplit(os.environ["AWS_ENDPOINT_URL"])
        with s3_proxy((server.hostname, server.port)) as proxy:
            yield Bench(bucket, proxy)


def _client(pipe: Any, environment: dict[str, str], timeout_s: float, name: str, url: str, prepared: Any) -> None:
    os.environ.update(environment)
    import fsspec.config

    fsspec.config.conf["s3"] = {"config_kwargs": {"read_timeout": timeout_s}}
    pipe.send("ready")
    pipe.recv()
    try:
        told = ACTS[name].do(url, prepared)
    except AssertionError as error:
        told = error
    except Exception as error:  # a store's own types do not all travel
        told = StoreError(repr(error))
    pipe.send(told)


def run(bench: Bench, name: str, plan: Plan) -> Any:
    """One act under one fault, and what is found afterwards; what the client told."""
    act, bench.runs = ACTS[name], bench.runs + 1
    url = f"{bench.bucket}/run-{bench.runs}"
    save(url, OLD)
    prepared = act.prepare(url)
    environment = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    environment |= {"AWS_ENDPOINT_URL": bench.proxy.url, "AWS_MAX_ATTEMPTS": "2"}
    ours, theirs = CONTEXT.Pipe()
    timeout_s = READ_TIMEOUT_S if plan.fault.endswith("answer") else CLIENT_S
    client = CONTEXT.Process(target=_client, args=(theirs, environment, timeout_s, name, url, prepared), daemon=True)
    client.start()
    theirs.close()
    try:
        assert ours.poll(60) and ours.recv() == "ready"
        plan.victim = client.pid
        bench.proxy.arm(plan)
        ours.send("go")
        assert ours.poll(CLIENT_S), f"the client did not end: {plan}"
        told = ours.recv()
    except EOFError:
        told = None
    finally:
        client.kill()
        client.join(10)
        bench.proxy.arm(Plan())
    assert (told is None) == plan.fault.startswith("kill"), (told, plan)
    assert not isinstance(told, AssertionError), (told, plan)
    try:
        act.check(url, prepared, told)
    except Exception as error:
        raise AssertionError(f"{error!r} after {told!r} of {name} under {plan}") from error
    return told


def sweep(bench: Bench, name: str, fault: str, forever: bool, tally: Callable[..., None]) -> None:
    plain = Plan()
    run(bench, name, plain)
    assert plain.seen
    counts = {"requests": len(plain.seen), "killed": 0, "raised": 0, "returned": 0}
    for at, request in enumerate(plain.seen):
        if fault == "conflict" and not request.startswith("PUT"):
            continue
        plan = Plan(fault=fault, at=at, forever=forever)
        told = run(bench, name, plan)
        assert plan.done, plan
        counts["killed" if told is None else "raised" if isinstance(told, Exception) else "returned"] += 1
    tally("S3 requests", f"{name}, {fault}{' for ever' if forever else ''}", **counts)


@pytest.mark.parametrize("fault", ["kill before", "kill after"])
@pytest.mark.parametrize(
    "name", ["save", "commit", *(pytest.param(name, marks=pytest.mark.long) for name in ("save in parts", "deletion"))]
)
def test_a_kill_at_every_request(bench, name, fault, tally):
    sweep(bench, name, fault, False, tally)


@pytest.mark.parametrize("fault", ["slow down", "conflict", "reset in body", "no answer", "lost answer"])
def test_a_commit_whose_requests_fail_once(bench, fault, tally):
    sweep(bench, "commit", fault, False, tally)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("forever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("fault", ["slow down", "conflict", "reset in body", "no answer", "lost answer"])
@pytest.mark.parametrize("name", list(ACTS))
def test_requests_that_fail(bench, name, fault, forever, tally):
    if (name, fault) == ("restore", "conflict") or (name, fault) == ("deletion", "conflict"):
        pytest.skip("S3 answers 409 to what it is to create")
    if name == "commit" and not forever:
        pytest.skip("not only in the long suite")
    sweep(bench, name, fault, forever, tally)
