"""JobSpec: a whole training job as one validated document.

TOML in; what comes out has every default filled in and every number checked against the others, before any resource
is taken. An error names the field, its value and what would be valid.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import fsspec
import pydantic
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.core.events import OPEN_END, Layout, Limits
from orchestrator.runtime.fanin import FAN_IN_FROM_NODES, PATIENCE_S
from orchestrator.runtime.hangs import Patience
from storage.manifest import WRITE_DEADLINE_S
from storage.urls import SINGLE_WRITER, StoreError, check_protocol
from trainer.contract import (
    AuditConfig,
    CheckpointConfig,
    DataConfig,
    Degrees,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScriptConfig,
    WorkerConfig,
)

PRESETS = Path(__file__).resolve().parent.parent / "trainer" / "presets"

DIVISORS_SHOWN = 4096
"""Of a number that a degree must divide, the divisors up to here stand in the message; no mesh is so long a line."""

SCRIPT_RECOVERY_S: dict[str, float] = {"stall_floor_s": 60, "collective_timeout_s": 1800}
"""Defaults of [recovery] for a script: between two of its steps it may evaluate or write a checkpoint of its own, for
as long as it likes, and its groups wait as long as torch's do by default."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


class SpecError(ValueError):
    """The document is not a job that can run. The message has one line for each thing to mend."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(_Section):
    """What is trained, how long, and where its state is kept."""

    name: str = Field(description="Names the run in Ray, in shared memory and in metrics: a-z, 0-9 and -.")
    url: str = Field(
        default="",
        description="Run directory: any fsspec URL; shared by all nodes. Empty: runs/<name> in the current folder. "
        "``single-writer::`` before it waives exclusive creation (docs/checkpoints.md, Stores).",
    )
    steps: int = Field(default=1000, ge=1, description="Training steps; the learning rate ends its cosine here.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Of the weights and of the order of samples.")
    deterministic: bool = Field(default=True, description="Bitwise reproducible kernels only.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of activations and of the communicated parameters; the state is float32."
    )
    validation_interval_steps: int = Field(
        default=100,
        ge=1,
        description="Steps between passes over held-out text; also before the first and after the last.",
    )


class ClusterSection(_Section):
    """The nodes that the run takes."""

    device: Literal["cpu", "cuda"] = Field(default="cpu", description="gloo on CPUs, NCCL on CUDA.")
    slots_per_node: int = Field(default=1, ge=1, description="Ranks on each node; on CUDA, its GPUs.")
    spares: int = Field(default=0, ge=0, description="Ready nodes beyond those of the mesh.")
    cpus_per_slot: float = Field(
        default=1, gt=0, description="CPUs that Ray reserves for each rank, and its threads; at least one thread."
    )
    admission: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Before a node joins, its devices compute products whose exact result is known, for a second each "
        "(trainer/admission.py); one that is wrong keeps the node out. ``auto``: on CUDA.",
    )
    least_bandwidth_mb_s: int = Field(
        default=0,
        ge=0,
        description="MB/s (10^6 bytes) over TCP to and from other nodes of the run, below which a node does not join: "
        "it is measured with two of them, and kept out when both are slow. 0: not measured.",
    )
    warm_workers: int = Field(
        default=1,
        ge=0,
        description="Processes on each node that are ready to take a dead worker's place, beyond those that train; "
        "useful up to slots_per_node. Each takes the memory of a process without a model, and to make it half a second "
        "of a processor. On a spare there is one for each slot; with 0 none anywhere.",
    )
    domain_label: str = Field(
        default="", description="Ray node label that names a node's failure domain, as a rack; empty: none."
    )
    log_dir: str = Field(default="~/.local/state/shepherd", description="Node-local folder of logs and journal tails.")
    ram_dir: str = Field(default="", description="Node-local folder of snapshots; empty: /dev/shm/shepherd-<user id>.")


class RecoverySection(_Section):
    """Bounds of patience. Each is an upper bound for the worst case, not a wait in the usual one."""

    halt_deadline_s: float = Field(
        default=10,
        gt=0,
        description="For a node to end its workers; past it the node is lost. A kill takes milliseconds.",
    )
    park_deadline_s: float = Field(
        default=3,
        gt=0,
        description="For a worker to leave its process groups and keep its process when a generation ends; past it, "
        "or past half of halt_deadline_s, the worker is killed and started anew. Most need a tenth of a second; to "
        "wait longer than a start takes gains nothing.",
    )
    start_deadline_s: float = Field(
        default=300,
        gt=0,
        description="For a generation to come up: workers forked, rendezvous, model and state in place. As long again "
        "for its first step.",
    )
    wait_deadline_s: float = Field(
        default=600, gt=0, description="For enough nodes, at the start and after losses; autoscalers take minutes."
    )
    commit_deadline_s: float = Field(
        default=120, gt=0, description="For the last checkpoint's commit record; then the run fails."
    )
    node_silence_s: float = Field(
        default=4.5,
        gt=0,
        description="A node silent for so long is lost. Agents report each second; a closed connection tells sooner. A "
        "packet that is lost four times in a row comes after 3 s. From 256 nodes on, which report through others of "
        "them, the default is 10.",
    )
    collective_timeout_s: float = Field(
        default=120,
        gt=0,
        description="Last resort against a rank that hangs; must exceed the slowest step, validation and save. For "
        "a script the default is 1800.",
    )
    rank_silence_s: float = Field(
        default=4.5,
        ge=3,
        description="A rank silent for so long hangs, and is replaced; one whose process is not stopped, after "
        "stall_floor_s, if that is more. Workers give a sign of life each second.",
    )
    stall_floor_s: float = Field(
        default=4.5,
        ge=3,
        description="Patience with a mesh that makes no step; 3 times the slowest recent step, if that is more. For a "
        "script the default is 60.",
    )
    stragglers: Literal["report", "swap"] = Field(
        default="report",
        description="What follows when a rank computes more slowly than its peers (docs/stragglers.md). ``swap``: its "
        "node gets a strike, and a spare takes its place.",
    )
    same_error_tries: int = Field(
        default=2, ge=1, description="The same exception at the same step this many times is the program's own fault."
    )
    recoveries_without_progress: int = Field(
        default=8, ge=1, description="Crash-loop breaker: this many generations without one new step end the run."
    )
    strikes: int = Field(default=3, ge=1, description="Incidents that quarantine a node when a spare can replace it.")
    strike_expiry_s: float = Field(
        default=604800,
        gt=0,
        description="For so long a strike counts: a week. Llama 3's nodes failed once in 264 days each: three times in "
        "a week is no chance.",
    )
    probation_s: float = Field(
        default=86400,
        gt=0,
        description="After its return from quarantine, a node's next strike in this time sends it there for good.",
    )
    quarantine_share: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="Of the nodes, mesh and spares, so many may be quarantined at once, and always two: what strikes "
        "more is not theirs.",
    )
    min_replicas: int = Field(
        default=1,
        ge=1,
        description="When nodes are lost and no spare is left, the run goes on with fewer replicas, down to so many of "
        "parallel.dp_replicate; that number itself: it waits for nodes. Where a replica fills whole nodes: "
        "cluster.slots_per_node divides parallel.dp_shard x tp.",
    )
    fallback_meshes: tuple[Degrees, ...] = Field(
        default=(),
        description="Meshes to go on with when too few nodes are left even for min_replicas, in the order of "
        "preference, each on fewer nodes than the one before: tables of pp, dp_replicate, dp_shard and tp, of which "
        "what is left out is 1, as [{pp = 2, tp = 2}, {tp = 2}]. The state is resharded, and a rank holds more of it.",
    )
    grow_settle_s: float = Field(
        default=60,
        gt=0,
        description="A mesh that has shrunk waits so long for further nodes before it takes those that came back.",
    )
    driver_lease_s: float = Field(
        default=10, gt=0, description="The run ends this long after its driver's last sign of life (unless detached)."
    )


class MetricsSection(_Section):
    """The Prometheus endpoint, on the head node."""

    bind: str = Field(default="127.0.0.1", description="Address of the Prometheus endpoint.")
    port: int = Field(default=0, ge=0, lt=65536, description="0: a free one; `shepherd status` tells which.")


class JobSpec(_Section):
    run: RunSection
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    recovery: RecoverySection = RecoverySection()
    audit: AuditConfig = AuditConfig()
    script: ScriptConfig = ScriptConfig()
    cluster: ClusterSection = ClusterSection()
    metrics: MetricsSection = MetricsSection()

    @property
    def layout(self) -> Layout:
        p, width = self.parallel, self.cluster.slots_per_node
        whole_nodes = p.dp_shard * p.tp % width == 0
        return Layout(
            pp=p.pp,
            dp_replicate=p.dp_replicate,
            dp_shard=p.dp_shard,
            tp=p.tp,
            slots_per_node=width,
            nodes=p.world_size // width,
            spares=self.cluster.spares,
            shrinks_to=tuple(range(p.dp_replicate - 1, self.recovery.min_replicas - 1, -1)) if whole_nodes else (),
            fallbacks=self.recovery.fallback_meshes,
        )

    @property
    def is_script(self) -> bool:
        """Whether a script of the user's is run, not the Llama trainer."""
        return bool(self.script.command)

    @property
    def warm_workers(self) -> int:
        """Of each node of the mesh. All that can be done for a script before it is needed is a fork, and that takes no
        longer when it is."""
        return 0 if self.is_script else min(self.cluster.warm_workers, self.cluster.slots_per_node)

    @property
    def total_steps(self) -> int:
        """Steps after which the run is done; OPEN_END where a script decides."""
        return OPEN_END if self.is_script else self.run.steps

    @property
    def checks_admission(self) -> bool:
        return self.cluster.admission == "on" or (self.cluster.admission, self.cluster.device) == ("auto", "cuda")

    @property
    def limits(self) -> Limits:
        r = self.recovery
        return Limits(
            halt_deadline_us=_us(r.halt_deadline_s),
            start_deadline_us=_us(r.start_deadline_s),
            wait_deadline_us=_us(r.wait_deadline_s),
            commit_deadline_us=_us(r.commit_deadline_s),
            same_error_tries=r.same_error_tries,
            recoveries_without_progress=r.recoveries_without_progress,
            strikes=r.strikes,
            keep_checkpoints=self.checkpoint.keep,
            strike_expiry_us=_us(r.strike_expiry_s),
            probation_us=_us(r.probation_s),
            quarantined_at_most=max(2, math.floor(r.quarantine_share * (self.layout.nodes + self.layout.spares))),
            grow_settle_us=_us(r.grow_settle_s),
            keep_every_steps=self.checkpoint.keep_every_steps,
            scrub_us=_us(self.checkpoint.scrub_hours * 3600),
            verify_bytes_per_s=self.checkpoint.verify_mb_per_s * 1_000_000,
            swaps_slow=r.stragglers == "swap",
        )

    @property
    def patience(self) -> Patience:
        r = self.recovery
        return Patience(
            rank_silence_us=_us(r.rank_silence_s),
            stall_floor_us=_us(r.stall_floor_s),
            start_us=_us(r.start_deadline_s),
            save_us=_us(1.2 * WRITE_DEADLINE_S),
            # The groups of a script have time-outs of their own: nobody there fails after this one.
            collective_us=OPEN_END if self.is_script else _us(r.collective_timeout_s),
            waits_unseen=self.is_script and self.cluster.device == "cuda",
        )

    @property
    def worker_config(self) -> WorkerConfig:
        return WorkerConfig(
            run=self.run.name,
            url=self.run.url,
            steps=self.run.steps,
            seed=self.run.seed,
            deterministic=self.run.deterministic,
            device=self.cluster.device,
            dtype=self.run.dtype,
            validation_interval_steps=self.run.validation_interval_steps,
            collective_timeout_s=self.recovery.collective_timeout_s,
            model=self.model,
            data=self.data,
            parallel=self.parallel,
            optimizer=self.optimizer,
            checkpoint=self.checkpoint,
            audit=self.audit,
            script=self.script,
        )

    def document(self) -> dict[str, Any]:
        """The whole effective document."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Names this document: SHA-256 of its canonical JSON."""
        return hashlib.sha256(json.dumps(self.document(), sort_keys=True).encode()).hexdigest()


def load(path: str | Path, overrides: list[str] | None = None) -> JobSpec:
    """The spec of a TOML file (a path or an fsspec URL), with ``section.key=value`` overrides applied.

    Raises:
        SpecError: the file cannot be read or what it says cannot run.
    """
    return parse(read_document(str(path), overrides or []))


def read_document(path: str, overrides: list[str]) -> dict[str, Any]:
    """What a TOML file says, with overrides applied; an empty path is an empty file.

    Raises:
        SpecError: the file cannot be read, or an override is none.
    """
    raw = b""
    try:
        if path:
            with fsspec.open(path, "rb") as file:
                raw = file.read()
    except Exception as e:  # each file system has its own
        raise SpecError(f"{path}: cannot be read: {e}") from e
    try:
        document = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SpecError(f"{path}: is not TOML: {e}") from e
    for each in overrides:
        override(document, each)
    return document


def parse(document: dict[str, Any]) -> JobSpec:
    """The spec of a document as TOML gives it. Local paths that are relative start from the current folder.

    Raises:
        SpecError: see `load`.
    """
    document = _with_preset(document)
    try:
        # As JSON, because there pydantic takes no string or truth value for a number. TOML's dates become strings.
        spec = JobSpec.model_validate_json(json.dumps(document, default=str), strict=True)
    except pydantic.ValidationError as e:
        raise SpecError("\n".join(_line(error) for error in e.errors())) from e
    spec = _with_script(_with_silence(spec))
    problems = _script_problems(spec) or _problems(spec)
    if problems:
        raise SpecError("\n".join(problems))
    return _with_absolute_paths(spec)


def _least_silence_s(spec: JobSpec) -> float:
    """Below which nodes of such a run may be silent without being lost: one deadline to find that the fan-in through
    which they report is silent, one more when the next cannot be reached either."""
    return 2 * PATIENCE_S if spec.layout.nodes + spec.layout.spares >= FAN_IN_FROM_NODES else 0.0


def _with_silence(spec: JobSpec) -> JobSpec:
    """With the default of node_silence_s that goes with so many nodes."""
    recovery, least_s = spec.recovery, _least_silence_s(spec)
    if "node_silence_s" in recovery.model_fields_set or recovery.node_silence_s >= least_s:
        return spec
    return spec.model_copy(update={"recovery": recovery.model_copy(update={"node_silence_s": least_s})})


def _with_script(spec: JobSpec) -> JobSpec:
    """With the mesh and the defaults that go with a script: of its steps less is known than of Llama's."""
    if not spec.is_script or spec.script.nodes < 1:
        return spec
    own = {name: s for name, s in SCRIPT_RECOVERY_S.items() if name not in spec.recovery.model_fields_set}
    update: dict[str, Any] = {"recovery": spec.recovery.model_copy(update=own)}
    if spec.parallel == ParallelConfig():
        # Each rank's state is its own as far as anybody knows: shards, and no replicas.
        update["parallel"] = _script_mesh(spec)
    return spec.model_copy(update=update)


def _script_mesh(spec: JobSpec) -> ParallelConfig:
    return ParallelConfig(dp_shard=spec.script.nodes * spec.cluster.slots_per_node)


def _with_absolute_paths(spec: JobSpec) -> JobSpec:
    """Agents and workers have other current folders. `~` stays each node's own, but in run.url, which all share."""

    def absolute(path: str) -> str:
        return (
            path if not path or "://" in path or path.startswith(("~", SINGLE_WRITER)) else str(Path(path).absolute())
        )

    run, data, cluster = spec.run, spec.data, spec.cluster
    url = run.url or str(Path("runs", run.name))
    corpus = data.corpus if data.corpus == "python-stdlib" else absolute(data.corpus)
    script = spec.script
    if spec.is_script:
        script = dataclasses.replace(script, folder=absolute(script.folder or "."))
    folders = {"log_dir": absolute(cluster.log_dir), "ram_dir": absolute(cluster.ram_dir)}
    return spec.model_copy(
        update={
            "run": run.model_copy(update={"url": absolute(str(Path(url).expanduser()) if url[:1] == "~" else url)}),
            "data": dataclasses.replace(data, corpus=corpus, cache_dir=absolute(data.cache_dir)),
            "checkpoint": dataclasses.replace(spec.checkpoint, local_dir=absolute(spec.checkpoint.local_dir)),
            "script": script,
            "cluster": cluster.model_copy(update=folders),
        }
    )


def override(document: dict[str, Any], wish: str) -> None:
    """Set a field of a document as TOML gives it, by ``section.key=value``. Raises SpecError when it says otherwise."""
    key, equals, raw = wish.partition("=")
    section, dot, field = key.partition(".")
    if not (equals and dot and section and field):
        raise SpecError(f"--set {wish}: write section.key=value, as in --set run.steps=200")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw  # a bare word is a string
    target = document.setdefault(section, {})
    if not isinstance(target, dict):
        raise SpecError(f"{section}: must be a table, not {target!r}")
    target[field] = value


def _with_preset(document: dict[str, Any]) -> dict[str, Any]:
    model = document.get("model")
    if not isinstance(model, dict) or not model.get("preset"):
        return document
    names = sorted(path.stem for path in PRESETS.glob("*.toml"))
    if model["preset"] not in names:
        raise SpecError(
            f"model.preset = {model['preset']!r}: there is no such preset; choose one of {', '.join(names)}"
        )
    preset = tomllib.loads((PRESETS / f"{model['preset']}.toml").read_text())["model"]
    return document | {"model": preset | model}


def _line(error: Any) -> str:
    loc = error["loc"]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)[1:]
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        section = loc[0] if len(loc) > 1 else None
        valid = _DEGREES if "fallback_meshes" in loc[:-1] else _fields(section)
        return f"{field}: there is no such field; valid here: {', '.join(valid)}"
    if error["type"] == "missing":
        return f"{field}: is required"
    if error["type"] in ("model_type", "dataclass_type"):
        if "fallback_meshes" in loc:
            return f"{field} = {error['input']!r}: must be a table, as {{pp = 2, tp = 2}}, of {', '.join(_DEGREES)}"
        return f"{field} = {error['input']!r}: must be a table, [{field}], with {', '.join(_fields(loc[0]))}"
    return f"{field} = {error['input']!r}: {error['msg']}"


def _fields(section: str | int | None) -> list[str]:
    if section is None:
        return list(JobSpec.model_fields)
    kind = JobSpec.model_fields[str(section)].annotation if section in JobSpec.model_fields else None
    if kind is not None and dataclasses.is_dataclass(kind):
        return [f.name for f in dataclasses.fields(kind)]
    return list(getattr(kind, "model_fields", {}))


# Smallest valid values of the sections that are plain dataclasses (trainer.contract keeps free of pydantic).
_AT_LEAST: dict[str, dict[str, float]] = {
    "model": {
        "dim": 2,
        "n_layers": 1,
        "n_heads": 1,
        "n_kv_heads": 1,
        "ffn_dim": 1,
        "vocab_size": 260,
        "rope_theta": 1,
        "norm_eps": 0,
    },
    "data": {"seq_len": 1, "global_batch": 1, "validation_batches": 1},
    "parallel": {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "tp": 1, "microbatches": 1},
    "optimizer": {"lr": 0, "weight_decay": 0, "warmup_steps": 0, "clip_norm": 1e-12, "eps": 0, "final_lr_ratio": 0},
    "checkpoint": {
        "interval_steps": 1,
        "shortest_interval_steps": 1,
        "longest_interval_steps": 1,
        "snapshot_interval_steps": 1,
        "copy_interval_steps": 1,
        "copy_bytes_per_s": 0,
        "keep": 2,
        "keep_every_steps": 0,
        "scrub_hours": 0,
        "verify_mb_per_s": 1,
    },
}


_DEGREES = tuple(f.name for f in dataclasses.fields(Degrees))

_OF_LLAMA = ("model", "data", "optimizer", "audit")
_OF_LLAMA_RUN = ("steps", "seed", "deterministic", "dtype", "validation_interval_steps")


def _script_problems(spec: JobSpec) -> list[str]:
    """What is wrong with [script], and with what stands beside it; each line says what would be valid."""
    script, target = spec.script, list(spec.script.target)
    if not spec.is_script:
        idle = [name for name in ("folder", "nodes") if getattr(script, name) != getattr(ScriptConfig(), name)]
        return [f"script.{name}: is for a script; name it in script.command" for name in idle]
    of_llama = [name for name in _OF_LLAMA if getattr(spec, name) != JobSpec.model_fields[name].default]
    if spec.parallel != _script_mesh(spec):
        of_llama.append("parallel")
    if spec.recovery.fallback_meshes:
        of_llama.append("recovery.fallback_meshes")
    problems = [f"[{name}]: is the Llama trainer's; with script.command leave it out" for name in of_llama]
    problems += [
        f"run.{name} = {getattr(spec.run, name)!r}: is the Llama trainer's, a script decides by itself; leave it out"
        for name in _OF_LLAMA_RUN
        if getattr(spec.run, name) != RunSection.model_fields[name].default
    ]
    if script.nodes < 1:
        problems.append(f"script.nodes = {script.nodes}: must be at least 1")
    shown, valid = f"script.command = {list(script.command)}", 'as ["python", "train.py", "--epochs", "3"]'
    if not target or (target[0] == "-m" and len(target) < 2):
        problems.append(f"{shown}: names no script; write it {valid}")
    elif Path(target[0]).name == "torchrun" or target[:2] == ["-m", "torch.distributed.run"]:
        problems.append(f"{shown}: Shepherd takes torchrun's place; give what torchrun would start, {valid}")
    elif target[0].startswith("-") and target[0] != "-m":
        problems.append(f"{shown}: options of the interpreter cannot be set; write it {valid}")
    elif target[0] != "-m" and not target[0].endswith(".py"):
        problems.append(f"{shown}: {target[0]} must be a Python script; write it {valid}")
    return problems


def _problems(spec: JobSpec) -> list[str]:
    """What is wrong between fields; each line says what would be valid."""
    plain = {name: vars(getattr(spec, name)) for name in _AT_LEAST}
    problems = [
        f"{section}.{field} = {value}: must be finite"
        for section, values in plain.items()
        for field, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    problems += [
        f"{section}.{field} = {plain[section][field]}: must be at least {least:g}"
        for section, fields in _AT_LEAST.items()
        for field, least in fields.items()
        if plain[section][field] < least
    ]
    problems += [
        f"recovery.fallback_meshes[{number}].{name} = {getattr(mesh, name)}: must be at least 1"
        for number, mesh in enumerate(spec.recovery.fallback_meshes)
        for name in _DEGREES
        if getattr(mesh, name) < 1
    ]
    if problems:
        return problems  # the checks below divide by these
    m, d, p, c = spec.model, spec.data, spec.parallel, spec.cluster

    def divides(small: int, small_name: str, big: int, big_name: str) -> None:
        problems.extend(_not_divided(small, small_name, big, big_name))

    if not _NAME.fullmatch(spec.run.name):
        problems.append(f"run.name = {spec.run.name!r}: use 1 to 40 of a-z, 0-9 and -, not - at an end")
    divides(m.n_heads, "model.n_heads", m.dim, "model.dim")
    divides(m.n_kv_heads, "model.n_kv_heads", m.n_heads, "model.n_heads")
    if m.dim % m.n_heads == 0 and m.head_dim % 2:
        problems.append(f"model.dim / model.n_heads = {m.head_dim}: RoPE turns pairs, so it must be even")
    problems += _mesh_problems(spec, p.degrees, "parallel")
    if not spec.is_script:
        batch = "parallel.dp_replicate x dp_shard x microbatches"
        divides(p.dp * p.microbatches, batch, d.global_batch, "data.global_batch")
    if p.pp > 1 and p.microbatches < p.pp:
        problems.append(f"parallel.microbatches = {p.microbatches}: 1F1B needs at least parallel.pp = {p.pp}")
    if spec.recovery.min_replicas > p.dp_replicate:
        problems.append(
            f"recovery.min_replicas = {spec.recovery.min_replicas}: must be at most parallel.dp_replicate = "
            f"{p.dp_replicate}"
        )
    if not problems:
        problems += _fallback_problems(spec)
    if not 0 < d.validation_fraction < 1:
        problems.append(f"data.validation_fraction = {d.validation_fraction}: must lie between 0 and 1")
    for beta in ("beta1", "beta2"):
        if not 0 <= getattr(spec.optimizer, beta) < 1:
            problems.append(f"optimizer.{beta} = {getattr(spec.optimizer, beta)}: must be at least 0 and below 1")
    if not 0 <= spec.optimizer.final_lr_ratio <= 1:
        problems.append(f"optimizer.final_lr_ratio = {spec.optimizer.final_lr_ratio}: must lie between 0 and 1")
    k = spec.checkpoint
    if k.interval == "auto" and not k.shortest_interval_steps <= k.interval_steps <= k.longest_interval_steps:
        problems.append(
            f'checkpoint.interval_steps = {k.interval_steps}: with interval = "auto" it is the first one, so it must '
            f"lie between shortest_interval_steps = {k.shortest_interval_steps} and longest_interval_steps = "
            f"{k.longest_interval_steps}"
        )
    nodes, least_s = spec.layout.nodes + c.spares, _least_silence_s(spec)
    if spec.recovery.node_silence_s < least_s:
        problems.append(
            f"recovery.node_silence_s = {spec.recovery.node_silence_s:g}: must be at least {least_s:g} with {nodes} "
            f"nodes; they notice after {PATIENCE_S:g} s that one through which they report is silent"
        )
    try:
        check_protocol(spec.run.url)
    except StoreError as e:
        problems.append(f"run.url = {spec.run.url!r}: {e}")
    return problems


def _not_divided(small: int, small_name: str, big: int, big_name: str) -> list[str]:
    if big % small == 0:
        return []
    valid = ", ".join(str(n) for n in range(1, min(big, DIVISORS_SHOWN) + 1) if big % n == 0)
    return [f"{small_name} = {small}: must divide {big_name} = {big}; valid: {valid}"]


def _mesh_problems(spec: JobSpec, mesh: Degrees, where: str) -> list[str]:
    """What keeps a mesh from fitting the model and whole nodes."""
    m, tp, slots = spec.model, mesh.tp, spec.cluster.slots_per_node
    problems = [
        *_not_divided(tp, f"{where}.tp", m.n_kv_heads, "model.n_kv_heads"),
        *_not_divided(tp, f"{where}.tp", m.ffn_dim, "model.ffn_dim"),
        *_not_divided(tp, f"{where}.tp", m.vocab_size, "model.vocab_size"),
        *_not_divided(tp, f"{where}.tp", spec.data.seq_len, "data.seq_len"),  # sequence parallel
        *_not_divided(tp, f"{where}.tp", slots, "cluster.slots_per_node"),  # tp stays inside a node
        *_not_divided(slots, "cluster.slots_per_node", mesh.world_size, f"{where}'s slots"),
    ]
    if mesh.pp > m.n_layers:
        problems.append(f"{where}.pp = {mesh.pp}: each stage needs a layer; at most model.n_layers = {m.n_layers}")
    return problems


def _fallback_problems(spec: JobSpec) -> list[str]:
    """What is wrong with recovery.fallback_meshes, in a job that is right otherwise."""
    problems: list[str] = []
    config, layout = spec.worker_config, spec.layout
    fewest = layout.with_replicas(min((layout.dp_replicate, *layout.shrinks_to))).nodes
    for number, mesh in enumerate(spec.recovery.fallback_meshes):
        where = f"recovery.fallback_meshes[{number}]"
        found = _mesh_problems(spec, mesh, where)
        # Microbatches keep their size, so that a rank's activations do where tp stays.
        rounds = config.data.global_batch // config.samples
        found += _not_divided(mesh.dp_shard, f"{where}.dp_shard", rounds, "the microbatches of a step")
        each = rounds // (mesh.dp_shard * mesh.dp_replicate)
        if not found and each < mesh.pp:
            found.append(
                f"{where}.pp = {mesh.pp}: 1F1B needs at least as many microbatches, and each replica takes {each} of "
                f"{config.samples} samples in a step; give it fewer replicas, or parallel.microbatches a larger value"
            )
        nodes = mesh.world_size // spec.cluster.slots_per_node
        if not found and nodes >= fewest:
            found.append(
                f"{where}: {mesh} takes {nodes} nodes; it must take fewer than the {fewest} of the mesh before it, or "
                "it would never be used"
            )
        fewest = min(fewest, nodes)
        problems += found
    return problems


def _us(seconds: float) -> int:
    return round(seconds * 1_000_000)
