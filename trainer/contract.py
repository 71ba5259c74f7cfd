"""The contract of a worker: its configuration, and the messages between it and its agent.

Pure: standard library only, so that the orchestrator can import it without importing torch. Messages are frozen
dataclasses; on the wire each is one JSON object with its type's name under ``"type"``, framed by a 4-byte length
(`send` and `Receiver` below). Durations are integers in microseconds; times of day never cross this line.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import socket
import struct
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

T = TypeVar("T")

# One frame holds one message. The largest is an assignment at 16,384 ranks with its checkpoint record (about 4 MB).
MAX_FRAME_BYTES = 64 * 1024 * 1024


# --- configuration: the parts of the job that a worker needs ---------------------------------------------------------
# pydantic validates these same classes where they stand in the JobSpec (orchestrator/spec.py), hence the config hook.


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama by its shape (Touvron et al. 2023a, 2023b; Grattafiori et al. 2024, Table 3)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    preset: str = ""
    """Name of a file in trainer/presets that gives every field that is not set here."""
    dim: int = 256
    """Width of the residual stream."""
    n_layers: int = 4
    """Transformer blocks."""
    n_heads: int = 8
    """Query heads."""
    n_kv_heads: int = 4
    """Key and value heads; fewer than n_heads is grouped-query attention (Ainslie et al. 2023)."""
    ffn_dim: int = 704
    """Width of the SwiGLU feed-forward."""
    vocab_size: int = 4096
    """Size of the embedding; the byte-level BPE tokenizer is trained to this size."""
    rope_theta: float = 500_000.0
    """Base of the rotary angles."""
    norm_eps: float = 1e-5
    """Added to the mean square under RMSNorm's root."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus, and how it is cut into samples and batches."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    corpus: str = "python-stdlib"
    """An fsspec URL or glob of text files, or ``python-stdlib``: the source text of Python's standard library."""
    seq_len: int = 128
    """Tokens in one sample."""
    global_batch: int = 8
    """Samples in one step, over all data-parallel ranks."""
    validation_fraction: float = 0.02
    """Share of the documents held out, chosen by the digest of their text."""
    validation_batches: int = 4
    """Global batches in one validation pass."""
    cache_dir: str = "~/.cache/shepherd/data"
    """Node-local folder for tokenizers and token shards, keyed by the content of the corpus."""


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """A mesh by its size in each dimension; those that are not named are 1."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.tp

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in vars(self).items() if size > 1) or "one rank"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The mesh. Ranks are numbered row-major over (pp, dp_replicate, dp_shard, tp), so tp neighbours are adjacent."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Replicas of the sharded state; each is a live copy from which a lost slot of another can be restored."""
    dp_shard: int = 1
    """Ranks over which parameters and optimizer state are sharded (FSDP2)."""
    tp: int = 1
    """Ranks that split each matrix and the sequence between matrices; they share a node."""
    microbatches: int = 1
    """Microbatches that one step's local batch is cut into (1F1B wants at least pp)."""

    @property
    def degrees(self) -> Degrees:
        return Degrees(pp=self.pp, dp_replicate=self.dp_replicate, dp_shard=self.dp_shard, tp=self.tp)

    @property
    def world_size(self) -> int:
        return self.degrees.world_size

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) with linear warm-up, cosine decay and clipping, as Llama 2 section 2.2."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    lr: float = 3e-4
    """Peak of the learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled; of matrices only."""
    warmup_steps: int = 2000
    """Steps of linear warm-up to the peak."""
    final_lr_ratio: float = 0.1
    """The cosine ends at this share of the peak, at the run's last step."""
    clip_norm: float = 1.0
    """Largest norm of the gradient over the whole mesh."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When state is saved."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    interval: Literal["fixed", "auto"] = "fixed"
    """``auto``: the controller retunes the interval, from what saves and failures have cost this run."""
    interval_steps: int = 100
    """Steps between durable checkpoints, for ``auto`` at first; the last step is always checkpointed."""
    shortest_interval_steps: int = 10
    """``auto`` goes no lower."""
    longest_interval_steps: int = 1000
    """``auto`` goes no higher: what you would bear to lose with the memory of the whole cluster."""
    snapshot_interval_steps: int = 1
    """Steps between snapshots of each rank's own shard into the node's shared memory."""
    keep: int = 3
    """Verified checkpoints that are kept, the newest; older ones are deleted. At least 2."""
    keep_every_steps: int = 0
    """Checkpoints of multiples of these steps are kept for good; 0: none are. (Pinned ones are, in any case.)"""
    scrub_hours: float = 24.0
    """Each kept checkpoint is read anew so long after it was last found whole; 0: never. A disk's latent errors are
    measured in months, and a day bounds for how long a bad copy is counted on."""
    verify_mb_per_s: int = 500
    """At most so much (10^6 bytes) is read each second to verify a checkpoint, by one node at a time: a 25th of a
    100 Gbit/s link."""
    copies: Literal["auto", "off"] = "auto"
    """``auto``: snapshots are copied to another node's memory, unless replicas stand in other failure domains."""
    copy_interval_steps: int = 1
    """Steps between such copies, at least; the next begins when the last has arrived from every node."""
    copy_bytes_per_s: int = 0
    """Cap on what a node takes in of such copies; 0: none."""
    local_dir: str = ""
    """Folder on each node's own disk that keeps the node's parts of so many checkpoints, too; empty: none."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Checks of the numbers in each step."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    finite: bool = True
    """Stop the step before the optimizer takes it when the loss or the gradient norm is not finite."""
    at_rest: bool = True
    """Check in each step that parameters and moments are what the optimizer left after the step before."""
    replicas: bool = True
    """Check in each step that replicas (dp_replicate) hold the same bits."""


@dataclass(frozen=True, kw_only=True)
class ScriptConfig:
    """A training script of your own in place of the Llama trainer (docs/sessions.md)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    command: tuple[str, ...] = ()
    """``python``, a script or ``-m`` and a module, and their arguments; empty: the Llama trainer. It runs in the Python
    that Ray was started from."""
    folder: str = ""
    """Its working folder, the same on every node; empty: the current folder of the command that starts the run."""
    nodes: int = 1
    """Nodes that it takes, without spares; on each run `cluster.slots_per_node` processes of it."""

    @property
    def target(self) -> tuple[str, ...]:
        """The command without its interpreter: a script's path, or ``-m`` and a module; then the arguments."""
        interpreter = self.command[0].rpartition("/")[2] if self.command else ""
        return self.command[re.fullmatch(r"python(3(\.\d+)?)?", interpreter) is not None :]


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Everything that decides the numbers of a run. Its digest and the numeric class name a reproducible result."""

    run: str
    url: str
    steps: int
    seed: int
    deterministic: bool
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    validation_interval_steps: int
    collective_timeout_s: float
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    audit: AuditConfig
    data_digest: str = ""
    """Of the tokens and their order, as all nodes have prepared them; a worker that finds others refuses to train."""
    microbatch_samples: int = 0
    """Samples in each microbatch of a rank, in another mesh than the spec's; 0: what `parallel` makes of the global
    batch."""
    script: ScriptConfig = ScriptConfig()
    """With a command: what runs instead of the Llama trainer, for which the other sections but `checkpoint` are."""

    @property
    def samples(self) -> int:
        """In each microbatch of a rank."""
        p = self.parallel
        return self.microbatch_samples or self.data.global_batch // (p.dp * p.microbatches)

    def microbatches_of(self, replica: int) -> range:
        """The microbatches of a step are numbered over all replicas: those that this one takes.

        A run of them, as even as possible. Some replicas have one more where their number does not divide them:
        replicas meet only when gradients are reduced, after the last one.
        """
        count = self.data.global_batch // (self.parallel.dp_shard * self.samples)
        return even_part(count, self.parallel.dp_replicate, replica)

    def on_mesh(self, degrees: Degrees) -> WorkerConfig:
        """The same steps on another mesh: microbatches keep their size; where replicas are fewer, each takes more of
        them. `parallel.microbatches` is then the most that one takes. With other replicas only, a rank's memory stays
        what it was, too."""
        if degrees == self.parallel.degrees:
            return self
        rounds = self.data.global_batch // (degrees.dp_shard * self.samples)
        parallel = ParallelConfig(**vars(degrees), microbatches=-(-rounds // degrees.dp_replicate))
        return dataclasses.replace(self, parallel=parallel, microbatch_samples=self.samples)


def even_part(n: int, parts: int, number: int) -> range:
    """Part `number` of `n` things in a row; those that are left over go to the first parts."""
    each, over = divmod(n, parts)
    start = number * each + min(number, over)
    return range(start, start + each + (number < over))


# --- agent -> worker -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Restore:
    """Where the state of a generation comes from; `step` is the number of steps that it has completed."""

    source: Literal["init", "ram", "durable"]
    step: int = 0
    generation: int = 0
    """The generation that wrote the snapshot, for ``ram``."""
    commit: str = ""
    """Name of the commit record under run.url, for ``durable``."""
    slots: tuple[int, ...] = ()
    """For ``ram``: the slots that hold this rank's shard, as that generation numbered them. The node has the snapshot
    of one of them; empty: of the rank's own number."""
    reshard: bool = False
    """For ``ram``: that generation's mesh had other shards. Each rank offers what its node holds of the snapshots, and
    takes what it needs from all."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A node that may hold the snapshot that a rank is restored from, too: asked for blocks that are damaged."""

    node: str
    address: str
    """Of its peer server."""
    ray_node: str
    """As it is called there."""
    slot: int


@dataclass(frozen=True, kw_only=True)
class Assign:
    """Fill this slot in this generation. `rank` is the slot's number; the store is the generation's own."""

    epoch: int
    generation: int
    rank: int
    world_size: int
    local_rank: int
    node: str
    store_host: str
    store_port: int
    restore: Restore
    config: WorkerConfig
    ram_dir: str
    """Folder of the node's RAM tier; this slot's snapshots are the files that storage.ram names there."""
    copies: bool = False
    """Whether snapshots of all ranks are copied to other nodes."""
    copied_step: int = 0
    """The newest step of which every rank's copy has arrived, in generations before; 0: none."""
    holders: tuple[Holder, ...] = ()
    """Who may hold what this rank restores from shared memory, too."""
    token: str = field(default="", repr=False)
    """The job's, to ask them."""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """To a worker that waits for its first assignment, which is likely to be this rank: warm up, answer with Parked of
    generation 0."""

    rank: int
    local_rank: int
    config: WorkerConfig


@dataclass(frozen=True, kw_only=True)
class Stop:
    """End at the next step boundary on which all ranks agree, with a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Park:
    """Leave `generation` at once, keep the process, answer with Parked, and wait for the next assignment."""

    generation: int


@dataclass(frozen=True, kw_only=True)
class SaveEvery:
    """To rank 0, which decides for all ranks: from the next step boundary on, save each so many steps."""

    steps: int


@dataclass(frozen=True, kw_only=True)
class Copied:
    """What became of the copy that CopyStep asked for."""

    step: int
    error: str = ""
    """Empty: it has arrived."""


@dataclass(frozen=True, kw_only=True)
class ReadRecorder:
    """Answer at once with Recorded, whatever the training thread waits in."""

    generation: int


@dataclass(frozen=True, kw_only=True)
class Inject:
    """Chaos: hurt yourself, and say with Injected what was done. Comes only from somebody who has the run's token."""

    number: int
    """Of the fault in the run's journal."""
    fault: Literal["exception", "flip", "segfault", "lock", "loop", "memory", "clock", "outage"]
    """What to do: trainer/harm.py."""
    seconds: float = 0.0
    """For ``clock``: how far it leaps. For ``outage``: how long the store refuses."""
    tensors: str = ""
    """For ``flip``: what the chosen tensor's name begins with: model/, exp_avg/ or exp_avg_sq/; empty: any."""
    pattern: Literal["bit", "run", "zero"] = "bit"
    """For ``flip``: one bit of one element; one bit in each of 2 to 16 neighbours; 1 to 16 neighbours zeroed."""
    seed: int = 0
    """Chooses tensor, element and bit."""


# --- worker -> agent -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What the worker is doing since now; the last one before a silence tells where it hangs."""

    generation: int
    rank: int
    step: int
    phase: Literal["rendezvous", "build", "restore", "compute", "checkpoint", "validate"]


Process = Literal["parked", "warm", "forked"]
PROCESSES: dict[Process, str] = {
    "parked": "it had served the generation before, and kept its process",
    "warm": "it was made ready before anybody needed it",
    "forked": "it was made for this generation",
}


@dataclass(frozen=True, kw_only=True)
class Restored:
    """The worker stands before its first step with the assigned state."""

    generation: int
    rank: int
    step: int
    source: str
    rendezvous_us: int
    build_us: int
    restore_us: int
    versions: dict[str, str] = field(default_factory=dict)
    """The rank's numeric class: library versions, instruction set, threads and the like, for the commit record."""
    process: Process = "forked"
    """Where the process came from that fills the rank's slot."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """Step number `step` (the first is 1) is complete on this rank."""

    generation: int
    rank: int
    step: int
    step_us: int
    """From the end of the step before to the end of this one; contains the parts below."""
    data_us: int
    """Waiting for the batch."""
    snapshot_us: int
    """Training blocked by the RAM snapshot."""
    save_us: int
    """Training blocked by the start of a durable save since the step before: the copy that is written meanwhile."""
    tokens: int
    """Tokens of the global batch."""
    loss: float | None
    """Mean over the global batch in nats per token; None except on rank 0."""
    grad_norm: float | None
    lr: float | None
    snapshot_step: int
    """Newest step whose RAM snapshot of this rank is complete; 0 when there is none."""
    copied_step: int = 0
    """Newest step whose snapshots have all been copied to other nodes; 0 when there is none."""
    own_us: int | None = None
    """Of `step_us`, what the training thread computed or waited for a core, without its waits for other ranks; None
    where it is not known, as on accelerators."""


@dataclass(frozen=True, kw_only=True)
class CopyStep:
    """This rank's snapshot of `step` is complete and stays: have it copied to another node, and answer with Copied."""

    generation: int
    rank: int
    step: int
    complete: int
    """The newest step of which every rank's copy has arrived; 0: none."""


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A snapshot was damaged where it lay; it was mended from another copy, or else the restore fails."""

    generation: int
    rank: int
    step: int
    node: str
    """That held it; empty: this rank's own."""
    detail: str
    """Which blocks of which tensors, for people."""


@dataclass(frozen=True, kw_only=True)
class Validated:
    generation: int
    rank: int
    step: int
    loss: float
    validate_us: int


@dataclass(frozen=True, kw_only=True)
class ShardWritten:
    """This rank's part of the durable checkpoint of `step` is written and synced, with what the commit must hold."""

    generation: int
    rank: int
    step: int
    part: dict[str, Any]
    """A storage.manifest.RankPart as its JSON object."""
    write_us: int
    """From the copy of the state until the part was on the store; training went on."""


@dataclass(frozen=True, kw_only=True)
class SaveFailed:
    """The durable save of `step` failed on this rank; training goes on."""

    generation: int
    rank: int
    step: int
    error: str
    write_us: int


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The worker's last words in a generation, before it exits or, after ``collective`` and ``unclean``, parks."""

    generation: int
    rank: int
    step: int
    kind: Literal["exception", "collective", "memory", "state", "store", "audit", "corrupt", "diverged", "unclean"]
    """``collective``: a peer broke the exchange, its cause lies elsewhere. ``state``: the state given is damaged.
    ``corrupt``: this rank's own state has changed at rest, or is the odd one among its replicas. ``diverged``: replicas
    differ, and which is wrong cannot be told. ``unclean``: another rank said so of its own."""
    error: str
    """Type and message on one line."""
    traceback: str


@dataclass(frozen=True, kw_only=True)
class Parked:
    """The worker has let go of its process groups, model and files, and waits for its next assignment."""

    generation: int
    rank: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The worker leaves its loop in good order after `step`."""

    generation: int
    rank: int
    step: int
    reason: Literal["completed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """A sign of life, each second, from a thread beside the training loop."""

    generation: int
    rank: int
    step: int
    waiting: bool
    """Whether the training loop stands in an exchange with other ranks."""
    where: str
    """Where the training loop stands: its innermost frames as file:line function, the innermost last."""
    exchanges: dict[str, int] = field(default_factory=dict)
    """How many exchanges this rank has begun in this generation, by the name of the process group: all its members
    call it the same."""


@dataclass(frozen=True, kw_only=True)
class Injected:
    """The ground truth of an Inject that was carried out."""

    generation: int
    rank: int
    step: int
    number: int
    detail: str


@dataclass(frozen=True, kw_only=True)
class GroupRecord:
    """A rank's newest collectives in one process group, by their numbers there: all members count alike, from 1."""

    about: str
    """What the group is for, in the words of who made it."""
    begun: int
    """The newest that the rank has begun."""
    waits: int = 0
    """The oldest that it has begun and that is not complete; 0: none."""
    kind: str = ""
    """Of that: its name and, where all members must bring equally much, how much."""
    waited_us: int = 0
    """For how long it, or an older message that is not complete, has been under way when this was told; 0: none is."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What torch's flight recorder knows of this rank's collectives in this generation (trainer/recorder.py)."""

    generation: int
    rank: int
    groups: dict[str, GroupRecord]
    """By transport and name of the group; empty: there is no recorder, or nothing was recorded."""
    entries: str
    """The newest as a JSON array, the newest last, in torch's own form; empty when `groups` is."""


ToWorker = Assign | Prepare | Stop | Park | SaveEvery | Copied | ReadRecorder | Inject
FromWorker = (
    Phase
    | Restored
    | StepDone
    | CopyStep
    | Damaged
    | Validated
    | ShardWritten
    | SaveFailed
    | Failed
    | Parked
    | Finished
    | Pulse
    | Recorded
    | Injected
)

# Exit codes of a worker process. A worker that dies of a signal has the signal's number as the kernel reports it.
EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_AGENT_GONE = 75
# It was to park, and cannot: nobody's failure.
EXIT_CANNOT_PARK = 76


# --- wire ------------------------------------------------------------------------------------------------------------


def encode(message: object) -> dict[str, Any]:
    """The JSON object of a message: its fields and, under "type", its class name."""
    assert dataclasses.is_dataclass(message) and not isinstance(message, type)
    return {"type": type(message).__name__, **dataclasses.asdict(message)}


def decode(document: dict[str, Any], kinds: Any) -> Any:
    """The message of a JSON object made by `encode`; `kinds` is the union of the types that may come."""
    by_name = {kind.__name__: kind for kind in typing.get_args(kinds)}
    document = dict(document)
    name = document.pop("type", None)
    if name not in by_name:
        raise ValueError(f"message type {name!r} is not one of {sorted(by_name)}")
    return build(by_name[name], document)


def build(kind: type[T], document: dict[str, Any]) -> T:
    """A dataclass from a JSON object, nested dataclasses and tuples included.

    Raises:
        ValueError: a field is missing, or one is there that `kind` does not have.
    """
    hints = _hints(kind)  # type: ignore[arg-type]
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(document) - set(fields))
    missing = sorted(
        name
        for name, f in fields.items()
        if name not in document and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        raise ValueError(f"{kind.__name__}: unknown fields {unknown}, missing fields {missing}")
    return kind(**{name: _value(hints[name], value) for name, value in document.items()})


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _value(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(hint, value)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_value(args[0], item) for item in value)
        return tuple(_value(kind, item) for kind, item in zip(args, value, strict=True))
    if origin is list:
        return [_value(args[0], item) for item in value]
    if origin is dict:
        key = (lambda k: int(k)) if args[0] is int else (lambda k: k)
        return {key(k): _value(args[1], v) for k, v in value.items()}
    if origin in (typing.Union, types.UnionType) and value is not None:
        return _value(next(kind for kind in args if kind is not type(None)), value)
    return value


def frame(message: object) -> bytes:
    """A message as it goes over the wire."""
    body = json.dumps(encode(message), separators=(",", ":")).encode()
    assert len(body) <= MAX_FRAME_BYTES, len(body)
    return struct.pack("<I", len(body)) + body


def send(sock: socket.socket, message: object) -> None:
    """Write one frame; blocks until the kernel has taken it (or the socket's own timeout)."""
    sock.sendall(frame(message))


@dataclass
class Receiver:
    """Cuts a byte stream into messages; feed it what `recv` returned."""

    kinds: Any
    _buffer: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> list[Any]:
        """The messages that `data` completes, in order.

        Raises:
            ValueError: a frame is longer than MAX_FRAME_BYTES or is no message of `kinds`.
        """
        self._buffer += data
        messages = []
        while len(self._buffer) >= 4:
            (length,) = struct.unpack_from("<I", self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes is longer than {MAX_FRAME_BYTES}")
            if len(self._buffer) < 4 + length:
                break
            messages.append(decode(json.loads(bytes(self._buffer[4 : 4 + length])), self.kinds))
            del self._buffer[: 4 + length]
        return messages
