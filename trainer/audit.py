"""Evidence of silent corruption: state at rest must not change, and replicas must hold the same bits.

The promise: a change of parameters or moments between the end of one step and the optimizer of the next is found before
that optimizer runs, and the rank that owns the state is named without asking a peer. Replicas are compared at the same
moment. What this cannot see stands in docs/corruption.md.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xxhash
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from storage.manifest import ManifestError
from storage.state import RANK_PREFIX, host_bytes, local_tensor
from trainer.contract import AuditConfig

# Words of 8 bytes in a row of `device_fingerprint`. Weights take 1/512 of the largest tensor.
ROW_WORDS = 512
ROW_BYTES = 8 * ROW_WORDS

# What `device_fingerprint` works on at once, so that the copy which it makes stays in the last-level cache: of a CPU
# core (1 to 2 MiB), and of a data-centre GPU (40 MB and more), where smaller pieces would cost more in kernel launches.
CPU_CHUNK_BYTES = 2**19
CUDA_CHUNK_BYTES = 2**24

# 2^64 divided by the golden ratio, made odd: the multiplier of Fibonacci hashing and splitmix64 (Steele et al. 2014).
GOLDEN = 0x9E3779B97F4A7C15

# Tensors that a finding names; evidence goes to the journal, which is no place for a list of all.
NAMED_TENSORS = 8

# Name under which a snapshot holds the fingerprints of the state that it was made of.
MARK = "audit"

FindingKind = Literal["corrupt", "diverged"]


class StateCorruptError(RuntimeError):
    """This rank's own state has changed at rest, or is the odd one among its replicas."""


class StateDivergedError(RuntimeError):
    """This rank's state differs from its replicas', and which is wrong cannot be told."""


class PeerStateError(RuntimeError):
    """Another rank's state is corrupt or has diverged; this rank stops with it."""


@dataclass(frozen=True)
class Finding:
    """What an audit holds against this rank's state, as in Failed: kind and evidence on one line."""

    kind: FindingKind
    detail: str


def stop_on(finding: Finding | None, corrupt: int, diverged: int) -> None:
    """End the step on every rank alike: `corrupt` and `diverged` are the numbers of ranks with such a finding.

    Raises:
        StateCorruptError, StateDivergedError: this rank has the finding.
        PeerStateError: only others have one.
    """
    if finding is not None:
        raise (StateCorruptError if finding.kind == "corrupt" else StateDivergedError)(finding.detail)
    if corrupt or diverged:
        raise PeerStateError(
            f"the audit of state stopped all ranks: corrupt on {corrupt}, diverged on {diverged}, none of them this one"
        )


def replica_group(mesh: DeviceMesh) -> distributed.ProcessGroup | None:
    """The ranks that hold the same shards as this one; None when there are no others."""
    replicas = mesh["dp_replicate"]
    return replicas.get_group() if replicas.size() > 1 else None


# --- fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint(tensor: Tensor) -> Tensor:
    """128 bits that stand for a local tensor's bits in row-major order, on its device: int64 [2].

    Of any dtype, size and layout; equal bits give equal fingerprints whatever the threads. Tensors in host memory
    get `host_fingerprint`, all others `device_fingerprint`, so compare only what comes from one kind of device.
    """
    return host_fingerprint(tensor) if tensor.device.type == "cpu" else device_fingerprint(tensor)


def host_fingerprint(tensor: Tensor) -> Tensor:
    """The xxh3_128 of a tensor's bytes, int64 [2]; ten times as fast on a CPU as sums of int64.

    It reads at the memory's own rate and has no linear structure, so no pattern of changes cancels by design. Each
    64-bit word is itself added to one of eight accumulators, and every step between is a bijection of them, so a change
    in one word always changes the 512 bits of the accumulators; their folding into 128 can hide it by chance alone.
    """
    return torch.frombuffer(bytearray(xxhash.xxh3_128_digest(host_bytes(tensor).data)), dtype=torch.int64)


@torch.no_grad()
def device_fingerprint(tensor: Tensor) -> Tensor:
    """Position-weighted sums of a tensor's 64-bit words on its own device, int64 [2]; the tail is padded with zeros.

    With the words as rows of ROW_WORDS, y a word after the premix and u, v, w odd weights, modulo 2^64:

        row word    = sum over r, c of u[r] v[c] y[r, c]
        column word = sum over c of w[c] v[c] (sum over r of y[r, c])

    Sums that wrap around are associative, so the result depends on no order of reduction, and the CPU computes the
    same. A change within one 64-bit word, so every flip of one bit, always changes both words of the result: the premix
    is a bijection, so y changes by some d that is not 0 modulo 2^64, and an odd factor has an inverse.

    The premix is a multiplication by an odd number, then ``x ^ (x >>> 32)``. Without it, the sign bits of two words
    would cancel: 2^63 times the sum of two odd weights is 0. With the shift alone, so would the sign bits of four
    neighbours in float32, which are bits 63 and 31 of two words: the shift would clear the lower of each.
    """
    assert sys.byteorder == "little"
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()  # only aligned bytes can be viewed as words
    count = data.numel() // ROW_BYTES
    whole = data[: count * ROW_BYTES].view(torch.int64).view(count, ROW_WORDS)
    tail = torch.zeros(ROW_BYTES, dtype=torch.uint8, device=data.device)
    tail[: data.numel() - count * ROW_BYTES] = data[count * ROW_BYTES :]

    u = _odd_weights(count + 1, 0, data.device)
    v, w = _odd_weights(ROW_WORDS, 1, data.device), _odd_weights(ROW_WORDS, 2, data.device)
    row_word = torch.zeros((), dtype=torch.int64, device=data.device)
    columns = torch.zeros(ROW_WORDS, dtype=torch.int64, device=data.device)
    step = (CPU_CHUNK_BYTES if data.device.type == "cpu" else CUDA_CHUNK_BYTES) // ROW_BYTES
    chunks = ((start, whole[start : start + step]) for start in range(0, count, step))
    for start, rows in (*chunks, (count, tail.view(torch.int64)[None])):
        y = rows * (GOLDEN - 2**64)
        halves = y.view(torch.int32).view(-1, 2)
        halves[:, 0].bitwise_xor_(halves[:, 1])  # the lower half ^= the upper one: x ^ (x >>> 32), in one pass
        y.mul_(v)
        row_word += y.sum(1).mul_(u[start : start + len(y)]).sum()
        columns += y.sum(0)
    return torch.stack([row_word, columns.mul_(w).sum()])


@functools.lru_cache(maxsize=256)
def _odd_weights(count: int, stream: int, device: torch.device) -> Tensor:
    """Fixed odd pseudo-random numbers, int64 [count]: splitmix64 of their position."""
    z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 48)) * np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)).to(device)


# --- the audit of one rank's state -----------------------------------------------------------------------------------


class StateAudit:
    """Fingerprints of this rank's parameters and moments, from the end of one step to the optimizer of the next."""

    def __init__(
        self, tensors: Mapping[str, Tensor], config: AuditConfig, replicas: distributed.ProcessGroup | None
    ) -> None:
        """`tensors` are the live state as in TrainState; `replicas` as `replica_group` tells."""
        # In the order of names, in which `check_copy` finds another rank's.
        self._tensors = {name: local_tensor(tensor) for name, tensor in sorted(tensors.items())}
        self._at_rest = config.at_rest
        self._group = replicas if config.replicas else None
        on_host = all(tensor.device.type == "cpu" for tensor in self._tensors.values())
        self._fingerprint = host_fingerprint if on_host else device_fingerprint
        self._recorded: Tensor | None = None

    def record(self) -> None:
        """Take the state as it is now for right: after the optimizer's step, and after a restore."""
        if self._at_rest:
            self._recorded = self._fingerprints()

    def check(self) -> Finding | None:
        """Compare the state with what was recorded, and with its replicas'. Called by all replicas together.

        One that has changed at rest is corrupt, and has no voice among its replicas. If the others differ, a strict
        majority is right and the rest are corrupt; without one, all of them have diverged.
        """
        if not self._at_rest and self._group is None:
            return None
        now = self._fingerprints().cpu()
        changed = self._changed(now)
        if self._group is None:
            return changed
        return self._compare(self._group, now, changed)

    def expectation(self) -> Callable[[Mapping[str, Tensor]], list[str]]:
        """A function that says which of the given copies of local tensors differ from what is recorded now.

        It is bound to this record and needs no lock: another thread may call it while training goes on. The copies may
        lie in host memory, and may be some of the tensors only. Without the check at rest it finds nothing.
        """
        if self._recorded is None:
            return lambda copies: []
        fingerprint_of, recorded = self._fingerprint, dict(zip(self._tensors, self._recorded.cpu(), strict=True))

        def changed_in(copies: Mapping[str, Tensor]) -> list[str]:
            found = {name: fingerprint_of(copy).cpu() for name, copy in copies.items()}
            return [name for name, value in found.items() if not torch.equal(value, recorded[name])]

        return changed_in

    def mark(self) -> dict[str, Tensor]:
        """What is recorded now, as a per-rank value for a copy of the state in shared memory."""
        return {} if self._recorded is None else {MARK: self._recorded.cpu()}

    def blank_mark(self) -> dict[str, Tensor]:
        """Room for the mark of a copy that is to be restored."""
        return {MARK: torch.zeros(len(self._tensors), 2, dtype=torch.int64)} if self._at_rest else {}

    def record_restored(self, mark: Mapping[str, Tensor]) -> None:
        """`record`, after checking that the state is what was recorded before it was copied.

        The mark of a copy that was taken over from a replica stays blank; its replica is compared in the next step.

        Raises:
            ManifestError: the state had changed when it was copied.
        """
        self.record()
        if MARK not in mark or not mark[MARK].any():
            return
        changed = self._changed(mark[MARK])
        if changed is not None:
            raise ManifestError(f"the snapshot was made of corrupt state: {changed.detail}")

    def check_copy(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Check what a rank's copy of its state holds against the mark in it, before other ranks take parts of it.

        Args:
            tensors: as `storage.snapshots.tensors_of` tells them.

        Raises:
            ManifestError: the state had changed when it was copied.
        """
        device = next(iter(self._tensors.values())).device
        names, found, mark = list[str](), list[Tensor](), None
        for name, tensor in tensors:
            if not name.startswith(RANK_PREFIX):
                names.append(name)
                found.append(self._fingerprint(tensor.to(device)).cpu())
            elif name.endswith(f"/{MARK}"):
                mark = tensor
        if mark is None:  # its writer did not audit
            return
        changed = [name for name, now, before in zip(names, found, mark, strict=True) if not torch.equal(now, before)]
        if changed:
            raise ManifestError(f"a snapshot was made of corrupt state: {_some(changed)} changed at rest")

    def _fingerprints(self) -> Tensor:
        """Of all tensors in order, int64 [n, 2], on the state's device."""
        return torch.stack([self._fingerprint(tensor) for tensor in self._tensors.values()])

    def _changed(self, now: Tensor) -> Finding | None:
        if not self._at_rest:
            return None
        assert self._recorded is not None, "record() comes before check()"
        recorded = self._recorded.cpu()
        changed = [
            f"{name} from {_hex(before)} to {_hex(after)}"
            for name, before, after in zip(self._tensors, recorded, now, strict=True)
            if not torch.equal(before, after)
        ]
        return Finding("corrupt", f"state changed at rest: {_some(changed)}") if changed else None

    def _compare(self, group: distributed.ProcessGroup, now: Tensor, changed: Finding | None) -> Finding | None:
        combined = host_fingerprint(now)
        vote = torch.cat([combined, torch.tensor([changed is not None])])
        votes = self._gather(group, vote)
        assert torch.equal(votes[distributed.get_rank(group)], vote), "an exchange was not carried out"
        digests = [None if vote[2] else _hex(vote[:2]) for vote in votes]
        kind = judge(digests, distributed.get_rank(group))
        if len({digest for digest in digests if digest is not None}) > 1:
            # All see the same votes, so all come here together: the evidence names what differs.
            replicas = self._gather(group, now)
        if kind is None or changed is not None:
            return changed
        voters = [replica for replica, digest in zip(replicas, digests, strict=True) if digest is not None]
        differing = [name for i, name in enumerate(self._tensors) if len({_hex(v[i]) for v in voters}) > 1]
        ranks = distributed.get_process_group_ranks(group)
        states = ", ".join(f"rank {rank} {digest or 'changed'}" for rank, digest in zip(ranks, digests, strict=True))
        return Finding(kind, f"replicas differ: {states}; in {_some(differing)}")

    def _gather(self, group: distributed.ProcessGroup, mine: Tensor) -> list[Tensor]:
        device = next(iter(self._tensors.values())).device
        all_of_them = [torch.empty_like(mine, device=device) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(all_of_them, mine.to(device), group=group)
        return [one.cpu() for one in all_of_them]


def judge(digests: Sequence[str | None], own: int) -> FindingKind | None:
    """What the digests of a state's replicas say about replica number `own`; None stands for one changed at rest."""
    if digests[own] is None:
        return "corrupt"
    voices = Counter(digest for digest in digests if digest is not None)
    (leader, count), *others = voices.most_common()
    if not others:
        return None
    if 2 * count > voices.total():
        return None if digests[own] == leader else "corrupt"
    return "diverged"


def _hex(pair: Tensor) -> str:
    return pair.numpy().tobytes().hex()


def _some(items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - NAMED_TENSORS} more" if len(items) > NAMED_TENSORS else ""
    return ", ".join(items[:NAMED_TENSORS]) + more
