"""What a run needs of each node, by arithmetic from the model's shape and the mesh, with the arithmetic to show."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.core.checkpoints import UNREAD_KEPT
from orchestrator.core.placement import replicas_apart, slots_of
from orchestrator.runtime.worker_log import FILE_MAX_BYTES
from orchestrator.spec import JobSpec
from storage.ram import COPY_FILES, FILES, FILES_WITH_COPIES
from trainer.contract import Degrees

STATE_BYTES = 12
"""Of a parameter in a checkpoint or a snapshot: itself and AdamW's two moments, float32 each."""
TRAINING_BYTES = 16
"""Of a parameter while it trains, activations not counted: the state and a float32 gradient."""
SNAPSHOT_OVERHEAD_BYTES = 128 * 1024
"""Of a slot's snapshot: its header page, the random state (5,056 bytes), and room for the next one's longer index."""
TENSOR_OVERHEAD_BYTES = 4096 + 512
"""Of each tensor in a snapshot: it begins on a page, and has an entry in the index."""
INDEX_BYTES_PER_MIB = 36
"""A block's digest."""
PROCESS_BYTES = 300 * 1024**2
"""Resident memory of a process that has imported torch with FSDP, pipelines and tensor parallelism, as measured."""
NODE_PROCESSES = 3
"""Beside the workers, warm ones included: the agent, its zygote, and the tool that prepares data."""
PROCESS_FILES = 256
"""Open files of a Ray actor or a worker that talks to nobody yet; measured are about 100, libraries come and go."""
WORKER_FILES = 8
"""That an agent keeps for each worker: socket, output, pidfd, store connections."""
WORKER_THREADS = {"cpu": 64, "cuda": 160}
"""Of a worker beside its OpenMP threads. On CPU some 20 were measured; NCCL and CUDA add their proxies and watchers."""
NODE_THREADS = 256
"""Of a node's agent, zygote and tools: a Ray actor has about 100."""
LOG_BYTES = 2 * FILE_MAX_BYTES
"""A worker log and its rotated predecessor."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What each node must have for its part. Of nodes with different parts, the largest."""

    parameters: int
    """Of the whole model."""
    node_parameters: int
    """That the fullest node's slots hold after sharding, replicas counted as often as they are there."""
    ram_bytes: int
    """In cluster.ram_dir: every slot's snapshots."""
    memory_bytes: int
    """Of the host, ram_bytes included."""
    device_bytes: int
    """Of each CUDA device, activations not counted; 0 on CPU."""
    checkpoint_bytes: int
    """Of one durable checkpoint, on the store."""
    part_bytes: int
    """Of a node's parts of one checkpoint, which lie in its temporary folder before they go to a remote store."""
    files: int
    """Open files of one process."""
    threads: int
    """Of all processes of the run on the node."""
    arithmetic: tuple[str, ...]
    """How the figures come about, a line each."""


def need_of(spec: JobSpec) -> Need:
    """What the run needs, whichever of its meshes it has."""
    whole, fallbacks = _need_on_mesh(spec), spec.recovery.fallback_meshes
    if not fallbacks:
        return whole
    needs = [whole, *(_need_on_mesh(_on_fallback(spec, mesh)) for mesh in fallbacks)]
    part_bytes = max(need.part_bytes for need in needs)
    # Files of snapshots never become smaller, and beside them stay those that the mesh before has left to restore from.
    files_of_ram = max(need.ram_bytes // need.part_bytes for need in needs) + 1
    ram_bytes = files_of_ram * part_bytes
    memory_bytes = ram_bytes + max(need.memory_bytes - need.ram_bytes for need in needs)
    return dataclasses.replace(
        whole,
        node_parameters=max(need.node_parameters for need in needs),
        ram_bytes=ram_bytes,
        memory_bytes=memory_bytes,
        device_bytes=max(need.device_bytes for need in needs),
        part_bytes=part_bytes,
        files=max(need.files for need in needs),
        threads=max(need.threads for need in needs),
        arithmetic=(
            *whole.arithmetic,
            *(f"fallback {mesh}: {need.arithmetic[0]}" for mesh, need in zip(fallbacks, needs[1:], strict=True)),
            f"with fallbacks: {files_of_ram} snapshots of the largest ({size(part_bytes)}) = {size(ram_bytes)} on a "
            f"node; memory with them = {size(memory_bytes)} on a node",
        ),
    )


def _on_fallback(spec: JobSpec, mesh: Degrees) -> JobSpec:
    """The job as if this were its mesh, and its only one."""
    recovery = spec.recovery.model_copy(update={"fallback_meshes": (), "min_replicas": mesh.dp_replicate})
    return spec.model_copy(update={"recovery": recovery, "parallel": spec.worker_config.on_mesh(mesh).parallel})


def _need_on_mesh(spec: JobSpec) -> Need:
    """As if there were no fallbacks."""
    layout = dataclasses.replace(spec.layout, fallbacks=())
    p, cuda = spec.parallel, spec.cluster.device == "cuda"
    of_stage = [sum(_local_sizes(spec, stage)) for stage in range(p.pp)]
    slots_per_stage = p.world_size // p.pp
    node_parameters = max(
        sum(of_stage[slot // slots_per_stage] for slot in slots_of(layout, place)) for place in range(layout.nodes)
    )
    parameters = _model_parameters(spec)
    slots, fullest = layout.slots_per_node, max(of_stage)
    tensors = 3 * max(len(list(_local_sizes(spec, stage))) for stage in range(p.pp))
    state_bytes = STATE_BYTES * node_parameters
    snapshot_bytes = state_bytes + (state_bytes >> 20) * INDEX_BYTES_PER_MIB
    snapshot_bytes += slots * (SNAPSHOT_OVERHEAD_BYTES + tensors * TENSOR_OVERHEAD_BYTES)
    # Racks are not known here: where all replicas stand in one, copies are made all the same.
    # A mesh that has shrunk to one replica makes copies, too.
    smallest = layout.smallest
    names = [str(place) for place in range(smallest.nodes)]
    copies = spec.checkpoint.copies == "auto" and smallest.nodes > 1
    copies = copies and not replicas_apart(smallest, names, lambda name: "")
    files_of_ram = FILES_WITH_COPIES + COPY_FILES if copies else FILES
    ram_bytes = files_of_ram * snapshot_bytes
    on_host = 0 if cuda else TRAINING_BYTES * node_parameters
    # A warm one has imported as much, and holds no model.
    workers = slots + spec.warm_workers
    processes = workers + NODE_PROCESSES
    groups = 2 * (p.world_size - 1) + (p.pp - 1) + (p.dp_replicate - 1) + (p.dp_shard - 1) + (p.tp - 1)
    omp = max(1, int(spec.cluster.cpus_per_slot))
    memory_bytes = ram_bytes + snapshot_bytes + on_host + processes * PROCESS_BYTES
    files = PROCESS_FILES + groups + 2 * layout.nodes + WORKER_FILES * slots
    threads = NODE_THREADS + workers * (WORKER_THREADS[spec.cluster.device] + omp)
    shrunk = ", once the mesh has shrunk to one replica" if smallest != layout else ""
    shards = f"pp {p.pp}, dp_shard {p.dp_shard}, tp {p.tp}"
    return Need(
        parameters=parameters,
        node_parameters=node_parameters,
        ram_bytes=ram_bytes,
        memory_bytes=memory_bytes,
        device_bytes=TRAINING_BYTES * fullest if cuda else 0,
        checkpoint_bytes=STATE_BYTES * parameters,
        part_bytes=snapshot_bytes,
        files=files,
        threads=threads,
        arithmetic=(
            "script: what its state takes is not known here; the figures are without it"
            if spec.is_script
            else f"model: {parameters:,} parameters; the fullest slot holds {fullest:,} of them ({shards}), the "
            f"fullest node {node_parameters:,} in {slots} slots",
            f"shared memory: {files_of_ram} snapshots "
            + (f"({FILES_WITH_COPIES} own, {COPY_FILES} kept for another node{shrunk}) " if copies else "")
            + f"x {STATE_BYTES} bytes (parameter and two moments) x "
            f"{node_parameters:,} = {size(ram_bytes)} on a node",
            f"memory: {size(ram_bytes)} of snapshots + {size(snapshot_bytes)} for the copy of which a checkpoint is "
            f"written + {size(on_host)} of training state ("
            + ("on the devices" if cuda else f"{TRAINING_BYTES} bytes x {node_parameters:,}, activations not counted")
            + f") + {processes} processes x {size(PROCESS_BYTES)} = {size(memory_bytes)} on a node",
            f"checkpoints: {STATE_BYTES} bytes x {parameters:,} = {size(STATE_BYTES * parameters)} each, of which "
            f"{checkpoints_at_once(spec)} are there at once (checkpoint.keep = {spec.checkpoint.keep}, "
            "one that is being verified, one that waits for it, and the one being written)",
            f"open files: {PROCESS_FILES} + {groups} connections to other ranks + 2 x {layout.nodes} nodes + "
            f"{WORKER_FILES} x {slots} workers = {files} in a process",
            f"threads: {NODE_THREADS} + {workers} workers x ({WORKER_THREADS[spec.cluster.device]} + {omp}) = "
            f"{threads} on a node",
        ),
    )


def checkpoints_at_once(spec: JobSpec) -> int:
    """Under run.url, those apart that are kept for good."""
    return spec.checkpoint.keep + UNREAD_KEPT + 1


def size(n_bytes: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n_bytes) < 1024 or unit == "TiB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError


def _model_parameters(spec: JobSpec) -> int:
    if spec.is_script:
        return 0
    m = spec.model
    attention = 2 * m.dim * m.dim + 2 * m.dim * m.n_kv_heads * m.head_dim
    block = attention + 3 * m.dim * m.ffn_dim + 2 * m.dim
    return m.n_layers * block + 2 * m.vocab_size * m.dim + m.dim


def _local_sizes(spec: JobSpec, stage: int) -> Iterator[int]:
    """Elements of each parameter that a slot of this pipeline stage holds, as trainer/parallel.py divides them: tp cuts
    rows or columns of matrices, then FSDP2 cuts rows, of which its last rank may have fewer."""
    if spec.is_script:
        return
    m, p = spec.model, spec.parallel
    kv = m.n_kv_heads * m.head_dim

    def shard(rows: int, columns: int) -> int:
        return -(-rows // p.dp_shard) * columns

    each, over = divmod(m.n_layers, p.pp)
    for _ in range(each + (stage < over)):
        yield from (shard(rows // p.tp, m.dim) for rows in (m.dim, kv, kv, m.ffn_dim, m.ffn_dim))
        yield from (shard(m.dim, columns // p.tp) for columns in (m.dim, m.ffn_dim))
        yield from (shard(m.dim, 1), shard(m.dim, 1))
    if stage == 0:
        yield shard(m.vocab_size // p.tp, m.dim)
    if stage == p.pp - 1:
        yield from (shard(m.vocab_size // p.tp, m.dim), shard(m.dim, 1))
