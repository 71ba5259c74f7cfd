"""The RAM tier: which snapshots are kept, what is recognised as torn or damaged, and death in the middle of a copy."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import signal
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_pool import CONTEXT

from storage import ram
from storage import snapshots as snapshots_module
from storage.blocks import SourceError, read_chunk
from storage.manifest import ManifestError
from storage.ram import HEADER_BYTES, choose_file, delete, drop_newer, inventory, newest_step, safe_name, snapshot_path
from storage.snapshots import RamTier
from storage.state import TrainState, host_bytes

RUN, NODE, SLOT = "run", "node-a", 3


@pytest.fixture
def folder():
    """Real shared memory: what matters here is what it does when a process dies."""
    path = Path(f"/dev/shm/shepherd-test-{os.getpid()}-{random.randrange(1 << 32):x}")
    yield str(path)
    shutil.rmtree(path, ignore_errors=True)


def state_of(step: int, elements: int = 1000) -> TrainState:
    """A state that is a pure function of its step."""
    values = torch.arange(elements, dtype=torch.float32) * (step + 1)
    tensors = {
        "model/w": values,
        "model/half": values[:33].bfloat16(),
        "scalar": torch.tensor(step),
        "none": torch.zeros(0),
    }
    return TrainState(step, tensors, {"rng": torch.full((5,), step % 256, dtype=torch.uint8)})


def blank(elements: int = 1000) -> TrainState:
    state = state_of(0, elements)
    for tensor in [*state.tensors.values(), *state.per_rank.values()]:
        tensor.fill_(-1 if tensor.dtype != torch.uint8 else 255)
    return state


def equal(a: TrainState, b: TrainState) -> bool:
    pairs = [(a.tensors, b.tensors), (a.per_rank, b.per_rank)]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


def take(snapshots: RamTier, state: TrainState) -> None:
    """A complete snapshot."""
    snapshots.snapshot(state)
    snapshots.wait()


def tier(folder: str, generation: int = 1, slot: int = SLOT) -> RamTier:
    return RamTier(folder, RUN, NODE, slot, generation=generation)


def test_a_snapshot_returns_bit_for_bit_in_another_process_lifetime(folder):
    take(tier(folder), state_of(7))
    restored = blank()
    tier(folder, generation=2).restore(7, restored)
    assert equal(restored, state_of(7))
    assert restored.step == 7


def test_without_pins_the_newest_two_are_always_held(folder):
    snapshots = tier(folder)
    for step in range(1, 12):
        take(snapshots, state_of(step))
        assert inventory(folder, RUN, NODE)[SLOT][-2:] == list(range(max(1, step - 1), step + 1))
        assert snapshots.newest == newest_step(folder, RUN, NODE, SLOT) == step


def test_a_pinned_snapshot_stays_until_another_is_pinned(folder):
    snapshots = tier(folder)
    for step in (1, 2, 3):
        take(snapshots, state_of(step))
    snapshots.pin(2)
    for step in range(4, 9):
        take(snapshots, state_of(step))
        assert {2, step} <= set(inventory(folder, RUN, NODE)[SLOT])
    snapshots.pin(8)
    take(snapshots, state_of(9))
    take(snapshots, state_of(10))
    assert 2 not in inventory(folder, RUN, NODE)[SLOT]


headers = st.one_of(
    st.none(),
    st.builds(
        ram.Header, run=st.just(""), node=st.just(""), slot=st.just(0), origin_slot=st.just(0), step=st.integers(0, 4),
        generation=st.integers(0, 2), payload_bytes=st.just(0), index_bytes=st.just(0), index_digest=st.just(""),
    ),
)  # fmt: skip


@given(st.lists(headers, min_size=2, max_size=4), st.data())
def test_the_newest_and_the_pinned_steps_survive_every_choice(held, data):
    pinned = data.draw(st.lists(st.integers(0, 4), max_size=len(held) - 2))
    after = [h for i, h in enumerate(held) if i != choose_file(held, pinned)]
    age = [(h.step, h.generation) for h in held if h is not None]
    left = [(h.step, h.generation) for h in after if h is not None]
    if age:
        assert max(age) in left
        for step in pinned:
            wanted = [a for a in age if a[0] == step]
            assert not wanted or max(wanted) in left
    if None in held:
        assert sorted(left) == sorted(age)


def test_restoring_a_step_that_is_not_there_is_refused(folder):
    take(tier(folder), state_of(1))
    with pytest.raises(ManifestError, match="no complete snapshot of slot 3, step 2"):
        tier(folder).restore(2, blank())


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.tensors.update({"model/w": torch.zeros(999)}),
        lambda s: s.tensors.update({"model/w": torch.zeros(1000, dtype=torch.int32)}),
        lambda s: s.tensors.update({"model/w": torch.zeros(10, 100)}),
        lambda s: s.tensors.update({"model/v": s.tensors.pop("model/w")}),
        lambda s: s.per_rank.clear(),
    ],
)
def test_a_snapshot_of_other_tensors_is_refused(folder, change):
    take(tier(folder), state_of(1))
    target = blank()
    change(target)
    with pytest.raises(ManifestError, match="other tensors"):
        tier(folder).restore(1, target)


@pytest.mark.parametrize("seed", range(60))
def test_damage_is_found_and_no_tensor_changes(folder, seed):
    """A flipped bit, a zeroed page or a cut anywhere in the file, header and counter included."""
    rng = random.Random(seed)
    take(tier(folder), state_of(1))
    path = snapshot_path(folder, RUN, NODE, SLOT, 1)
    assert path is not None
    raw = bytearray(path.read_bytes())
    header, chunks = ram.read_header(path), ram.ram_copy(path).index.chunks
    used = HEADER_BYTES + header.n_bytes
    kind = ("flip", "header", "page", "cut")[seed % 4]
    if kind == "flip":
        # Of a tensor or the index: what lies between tensors belongs to none, nor does the rest of the header page.
        regions = [(c.file_offset, c.n_bytes) for c in chunks if c.n_bytes]
        regions.append((header.payload_bytes, header.index_bytes))
        begin, n_bytes = rng.choice(regions)
        raw[HEADER_BYTES + begin + rng.randrange(n_bytes)] ^= 1 << rng.randrange(8)
    elif kind == "header":
        length = int.from_bytes(raw[16:20], "little")
        raw[rng.choice([*range(9), *range(16, 36 + length)])] ^= 1
    elif kind == "page":
        at = rng.randrange(-(-used // 4096)) * 4096
        raw[at : at + 4096] = bytes(len(raw[at : at + 4096]))
    else:
        raw = raw[: rng.randrange(used)]
    path.write_bytes(raw)
    target = blank()
    with pytest.raises(ManifestError):
        tier(folder).restore(1, target)
    assert equal(target, blank())


def test_a_file_under_another_slots_or_nodes_name_is_not_offered(folder):
    take(tier(folder), state_of(1))
    path = snapshot_path(folder, RUN, NODE, SLOT, 1)
    shutil.copy(path, path.with_name("slot-00004.0"))
    shutil.copytree(path.parent, path.parent.parent / "node-b")
    assert inventory(folder, RUN, NODE) == {SLOT: [1]}
    assert inventory(folder, RUN, "node-b") == {}


def test_deleting_a_node_leaves_the_others(folder):
    for node, slot in (("a", 0), ("a", 1), ("b", 2)):
        take(RamTier(folder, RUN, node, slot), state_of(4))
    assert inventory(folder, RUN, "a") == {0: [4], 1: [4]}
    delete(folder, RUN, "a")
    delete(folder, RUN, "a")
    assert inventory(folder, RUN, "a") == {}
    assert inventory(folder, RUN, "b") == {2: [4]}
    delete(folder, RUN, "b")
    assert not Path(folder).exists(), "with the last one its folders go, too"


def test_all_names_are_gone_before_any_memory_is_given_back(folder, monkeypatch):
    """Which takes seconds for hundreds of gigabytes: who deletes may be killed meanwhile."""
    closed: list[bool] = []

    class Held:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            closed.append(Path(folder).exists())

    take(RamTier(folder, RUN, "a", 0), state_of(4))
    monkeypatch.setattr(ram, "open", lambda path, mode: Held(), raising=False)
    delete(folder, RUN, "a")
    assert closed == [False] * ram.FILES


def test_snapshots_of_a_history_that_was_given_up_are_dropped(folder):
    for slot in (0, 1):
        writer = tier(folder, slot=slot)
        for step in (5, 6, 7):
            take(writer, state_of(step))
    drop_newer(folder, RUN, NODE, 5, slot=0)
    assert inventory(folder, RUN, NODE) == {0: [5], 1: [5, 6, 7]}
    take(writer, state_of(8))
    drop_newer(folder, RUN, NODE, 5)
    assert inventory(folder, RUN, NODE) == {0: [5]}
    take(writer, state_of(6))
    restored = blank()
    writer.restore(6, restored)
    assert equal(restored, state_of(6))


def test_of_two_snapshots_of_a_step_the_newer_generation_is_restored(folder):
    take(tier(folder, generation=2), state_of(5))
    changed = state_of(5)
    changed.tensors["scalar"].fill_(99)
    take(tier(folder, generation=3), changed)
    restored = blank()
    tier(folder, generation=4).restore(5, restored)
    assert equal(restored, changed)


def test_a_larger_state_takes_over_the_files(folder):
    snapshots = tier(folder)
    take(snapshots, state_of(1))
    take(snapshots, state_of(2, elements=100_000))
    restored = blank(100_000)
    tier(folder).restore(2, restored)
    assert equal(restored, state_of(2, elements=100_000))


def test_a_full_memory_file_system_names_what_is_needed(folder, monkeypatch):
    def full(fd, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("storage.ram.os.posix_fallocate", full)
    with pytest.raises(OSError, match=r"a snapshot needs \d+ bytes.*shm-size"):
        take(tier(folder), state_of(1))


@given(st.lists(st.text(max_size=90), max_size=20, unique=True))
def test_names_stay_distinct_and_inside_their_folder(names):
    safe = [safe_name(name) for name in names]
    assert len(set(safe)) == len(names)
    for name in safe:
        assert 0 < len(name) <= 64
        assert "/" not in name
        assert not name.startswith(".")
        assert name.isascii()


def _snapshot_forever(folder: str, step: int, pipe) -> None:
    snapshots = tier(folder)
    state = TrainState(step, {"w": torch.empty(4 << 20, dtype=torch.int32)}, {})
    while True:
        state.step = step
        state.tensors["w"].fill_(step)
        take(snapshots, state)
        pipe.send(step)
        step += 1


def being_written(folder: str) -> bool:
    """Whether a file of the slot holds no snapshot now: its counter is odd."""
    for path in ram.file_paths(folder, RUN, NODE, SLOT):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            head = file.read(ram.HEADER_BYTES)
            if ram.parse_header(head)[0] % 2:
                return True
    return False


def test_a_kill_in_the_middle_of_a_copy_leaves_the_older_snapshots(folder):
    """In 15 lives of a writer: each complete snapshot holds the content of its step, and the newest two that the
    writer reported are there."""
    rng = random.Random(1)
    last, torn = 0, 0
    for _ in range(15):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        writer = CONTEXT.Process(target=_snapshot_forever, args=(folder, last + 1, theirs), daemon=True)
        writer.start()
        theirs.close()
        for _ in range(rng.randrange(1, 5)):
            assert ours.poll(30)
            last = ours.recv()
        deadline = time.monotonic() + 30
        while not being_written(folder):
            assert time.monotonic() < deadline
        time.sleep(rng.random() * 0.005)  # the fault's moment, anywhere in a copy
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(10)
        while ours.poll(0):
            try:
                last = ours.recv()
            except EOFError:
                break
        held = inventory(folder, RUN, NODE)[SLOT]
        assert set(range(max(1, last - 1), last + 1)) <= set(held)
        files = sum(path.stat().st_size > 0 for path in ram.file_paths(folder, RUN, NODE, SLOT) if path.exists())
        torn += files == 3 and len(held) == 2
        for step in held:
            restored = TrainState(0, {"w": torch.zeros(4 << 20, dtype=torch.int32)}, {})
            tier(folder).restore(step, restored)
            assert bool((restored.tensors["w"] == step).all()), step
        last = held[-1]
    assert torn >= 3, f"only {torn} of 15 kills fell into a copy: the test does not test"


class Elsewhere:
    """Another file that may hold the same."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def copy(self):
        return ram.ram_copy(self.path)


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + at)
        byte = file.read(1)[0]
        file.seek(HEADER_BYTES + at)
        file.write(bytes([byte ^ 4]))


def test_a_damaged_block_is_mended_from_the_next_who_has_it_whole(folder):
    elements = 1_000_000  # four blocks
    for node in ("node-a", "node-b", "node-c"):
        take(RamTier(folder, RUN, node, SLOT, generation=1), state_of(5, elements))
    own, second, third = (snapshot_path(folder, RUN, node, SLOT, 5) for node in ("node-a", "node-b", "node-c"))
    (chunk,) = (c for c in ram.ram_copy(own).index.chunks if c.fqn == "model/w")
    flip(own, chunk.file_offset + 2_500_000)
    flip(second, chunk.file_offset + 2_500_001)
    with pytest.raises(ManifestError, match=r"model/w at \(0,\), block 2 is damaged"):
        tier(folder).restore(5, blank(elements), [Elsewhere(second)])
    bad, restored = [], blank(elements)
    tier(folder).restore(5, restored, [Elsewhere(Path(folder, "none")), Elsewhere(second), Elsewhere(third)], bad)
    assert equal(restored, state_of(5, elements))
    assert [(b.source, b.fqn, b.block) for b in bad] == [("node-a", "model/w", 2), ("node-b", "model/w", 2)]
    again: list = []
    tier(folder).restore(5, blank(elements), [], again)
    assert again == [], "it was mended where it lies"


def test_a_snapshot_is_a_copy_like_any_other(folder):
    take(tier(folder), state_of(5, 1_000_000))
    copy = ram.ram_copy(snapshot_path(folder, RUN, NODE, SLOT, 5))
    for chunk in copy.index.chunks:
        into, bad = bytearray(chunk.n_bytes), []
        read_chunk([(copy, chunk)], 0, len(chunk.blocks), memoryview(into), bad)
        name = chunk.fqn.removeprefix("rank/00003/")
        tensor = {**state_of(5, 1_000_000).tensors, **state_of(5).per_rank}[name]
        assert bytes(into) == host_bytes(tensor).tobytes() and bad == []
    take(tier(folder), state_of(6, 1_000_000))
    for step in (7, 8):
        take(tier(folder), state_of(step, 1_000_000))
    with pytest.raises(SourceError, match="overwritten"):
        read_chunk([(copy, chunk)], 0, len(chunk.blocks), memoryview(into), [])


def test_after_the_first_snapshot_nothing_is_allocated(folder, monkeypatch):
    """No file grows, and what Python holds does not: 12 MB of state a snapshot would show."""
    snapshots, state = tier(folder), state_of(1, 3_000_000)
    take(snapshots, state)
    blocks = sum(path.stat().st_blocks for path in Path(folder, RUN, NODE).iterdir())
    monkeypatch.setattr("storage.ram.os.posix_fallocate", None)
    tracemalloc.start()
    try:
        for step in range(2, 8):
            state.step = step
            take(snapshots, state)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            take(snapshots, state)
            assert tracemalloc.get_traced_memory()[1] - before < 200_000
    finally:
        tracemalloc.stop()
    assert blocks == sum(path.stat().st_blocks for path in Path(folder, RUN, NODE).iterdir())
    assert len(inventory(folder, RUN, NODE)[SLOT]) >= 1


def test_a_snapshot_is_not_complete_before_its_digests_are(folder, monkeypatch):
    held, let_go = threading.Event(), threading.Event()
    actual = snapshots_module.block_digests

    def slow(data):
        held.set()
        assert let_go.wait(30)
        return actual(data)

    snapshots = tier(folder)
    take(snapshots, state_of(1))
    monkeypatch.setattr(snapshots_module, "block_digests", slow)
    told = []
    snapshots.snapshot(state_of(2), told.append)
    assert held.wait(30)
    assert inventory(folder, RUN, NODE) == {SLOT: [1]} and told == []
    let_go.set()
    snapshots.wait()
    assert inventory(folder, RUN, NODE) == {SLOT: [1, 2]} and told == [None]


def test_a_snapshot_that_fails_is_told_and_is_one_less(folder, monkeypatch):
    def fail(data):
        raise MemoryError("no memory for digests")

    snapshots, told = tier(folder), []
    take(snapshots, state_of(1))
    with monkeypatch.context() as patch:
        patch.setattr(snapshots_module, "block_digests", fail)
        snapshots.snapshot(state_of(2), told.append)
        snapshots.wait()
    assert [type(error) for error in told] == [MemoryError]
    assert inventory(folder, RUN, NODE) == {SLOT: [1]}
    take(snapshots, state_of(3))
    assert inventory(folder, RUN, NODE) == {SLOT: [1, 3]}


def test_two_steps_stay_where_copies_are_sent(folder):
    snapshots = RamTier(folder, RUN, NODE, SLOT, generation=1, copies=True)
    for step in range(1, 4):
        take(snapshots, state_of(step))
    snapshots.pin(1, 3)
    for step in range(4, 9):
        take(snapshots, state_of(step))
        assert {1, 3, step} <= set(inventory(folder, RUN, NODE)[SLOT])


# --- mapping ----------------------------------------------------------------------------------------------------------


def mapped_kib(path: Path) -> int:
    """How much of a file this process has mapped with its pages in place, as the kernel says."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if line.endswith(str(path)))
    return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_a_file_is_mapped_page_by_page_before_it_is_used_and_not_by_mmap(folder, monkeypatch, kernel):
    """mmap itself would keep all other threads from running, for a second a GiB."""
    actual, flags = ram.mmap.mmap, []
    monkeypatch.setattr(ram.mmap, "mmap", lambda *args, **more: (flags.append(more["flags"]), actual(*args, **more))[1])
    if kernel == "old":
        monkeypatch.setattr(ram, "_madvise", lambda *args: -1)
    path = Path(folder, RUN, NODE, "slot-00000.0")
    file = ram.SnapshotFile(path, 64 << 20)
    assert mapped_kib(path) * 1024 == file.room + HEADER_BYTES
    assert flags == [mmap.MAP_SHARED]


def test_a_file_stands_until_it_is_deleted(folder):
    path = Path(folder, RUN, NODE, "slot-00000.0")
    file = ram.SnapshotFile(path, 4096)
    assert file.stands
    path.unlink()
    assert not file.stands
    ram.SnapshotFile(path, 4096)
    assert not file.stands, "another of the same name"


def test_the_snapshot_that_was_ordered_is_restored_and_no_other_generations(folder):
    for generation, value in ((1, 1.0), (2, 2.0)):
        tier = RamTier(folder, RUN, NODE, SLOT, generation=generation)
        tier.snapshot(TrainState(5, {"w": torch.full((3,), value)}, {}))
        tier.wait()
    restored = TrainState(0, {"w": torch.zeros(3)}, {})
    for generation, value in ((1, 1.0), (2, 2.0), (None, 2.0)):
        RamTier(folder, RUN, NODE, SLOT).restore(5, restored, generation=generation)
        assert restored.tensors["w"].tolist() == [value] * 3
    with pytest.raises(ManifestError, match=r"no complete snapshot of slot .*, step 5 that generation 3 wrote"):
        RamTier(folder, RUN, NODE, SLOT).restore(5, restored, generation=3)


def test_tensors_that_move_between_snapshots_are_found_where_they_are(folder):
    """Of the same names and shapes: in other memory, and in the same with another order of the elements."""
    tier = RamTier(folder, RUN, NODE, SLOT)
    memory = torch.arange(9.0)
    moved = (memory.view(3, 3), memory.view(3, 3).T, torch.ones(3, 3), memory.view(3, 3))
    for step, tensor in enumerate((tensor for tensor in moved for _ in range(4)), start=1):
        memory += 1
        tier.snapshot(TrainState(step, {"w": tensor}, {}))
        tier.wait()
        restored = TrainState(0, {"w": torch.zeros(3, 3)}, {})
        RamTier(folder, RUN, NODE, SLOT).restore(step, restored)
        assert torch.equal(restored.tensors["w"], tensor), step


def test_a_shard_is_restored_by_the_number_that_its_slot_had(folder):
    """In a mesh with another number of replicas; the random state of another rank stays where it is."""
    for slot in (2, SLOT, 6):
        take(tier(folder, slot=slot), state_of(slot))  # its step is the slot's number
    restored = blank()
    tier(folder).restore(6, restored, slots=(1, 4, 6))
    assert equal(TrainState(6, restored.tensors, {}), TrainState(6, state_of(6).tensors, {}))
    assert restored.per_rank["rng"].tolist() == [255] * 5
    tier(folder).restore(SLOT, restored, slots=(1, SLOT))
    assert equal(restored, state_of(SLOT)), "its own snapshot has its own random state"
    with pytest.raises(ManifestError, match="no complete snapshot of slot 1 or of 1 others, step 6"):
        tier(folder).restore(6, restored, slots=(1, 2))


def test_of_other_slots_the_snapshot_that_is_restored_may_stay(folder):
    for slot in (0, 1, 2):
        for generation, step in ((1, 4), (1, 5), (2, 5)):
            take(tier(folder, generation, slot), state_of(step))
    ram.drop_slots(folder, RUN, NODE, {0}, but=(1, 5))
    kept = {s: [(h.generation, h.step) for h in headers] for s, headers in ram.held(folder, RUN, NODE).items()}
    assert kept == {0: [(1, 4), (1, 5), (2, 5)], 1: [(1, 5)], 2: [(1, 5)]}
    ram.drop_slots(folder, RUN, NODE, {0})
    assert list(ram.held(folder, RUN, NODE)) == [0]
