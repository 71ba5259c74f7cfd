"""`shepherd checkpoints` diff, reshard-plan, export and import: what is inside checkpoints, and the way in and out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import tomli_w
from rich.console import Console
from rich.table import Table

from orchestrator import identity
from orchestrator import spec as specs
from orchestrator.checkpoints_command import (
    CheckpointsError,
    check_protocol,
    find_commit,
    mesh_words,
    progress_bar,
    split_step,
    store_errors,
)
from orchestrator.need import size
from orchestrator.runtime import journal
from storage import diff, export, imports, reshard
from storage.hugging_face import MODEL_PREFIX, LlamaShape
from storage.manifest import Commit, ManifestError
from storage.urls import locate, remove
from storage.windows import Saved, open_checkpoint

SHAPE_FIELDS = tuple(field.name for field in dataclasses.fields(LlamaShape))
MAX_POSITIONS = 2048
"""config.json's max_position_embeddings where no record tells the run's data.seq_len. The model itself has no limit."""
RANKS_SHOWN = 32
"""Of a plan; --json has all."""
DIFFERENCES_SHOWN = 100
"""Of a comparison; --json has all."""


def opened(url: str, step: int | None) -> Saved:
    """A checkpoint, its indices read and checked: `step`, or the newest."""
    commit = find_commit(url, step)
    with store_errors(url), _damage_in(url):
        return open_checkpoint(url, commit)


@contextlib.contextmanager
def _damage_in(*urls: str) -> Iterator[None]:
    """Damage that is met, with the URL under which it lies."""
    try:
        yield
    except ManifestError as e:
        raise CheckpointsError(f"{' or '.join(urls)}: {e}; `shepherd checkpoints verify` names all") from e


# --- diff ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    steps: tuple[int, int]
    differences: tuple[diff.Difference, ...]
    """Of every tensor, equal ones too."""
    without_per_rank: bool
    """Whether the ranks' own tensors were left out, as different numbers of ranks have written the two."""

    @property
    def equal(self) -> bool:
        return all(difference.kind == "equal" for difference in self.differences)

    def document(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "steps": self.steps,
            "without_per_rank": self.without_per_rank,
            "tensors": [dataclasses.asdict(difference) for difference in self.differences],
        }


def compare(first: str, second: str) -> Comparison:
    """Compare two checkpoints, each URL or URL@STEP."""
    a, b = opened(*split_step(first)), opened(*split_step(second))
    total = sum(tensor.n_bytes for tensor in a.tensors.values())
    found = []
    with store_errors(f"{first}, {second}"), _damage_in(first, second), progress_bar("compared", total) as progress:
        for difference in diff.compare(a, b):
            found.append(difference)
            if difference.fqn in a.tensors:
                progress(a.tensors[difference.fqn].n_bytes)
    return Comparison(
        steps=(a.commit.step, b.commit.step),
        differences=tuple(found),
        without_per_rank=not diff.same_ranks(a, b),
    )


def show_comparison(comparison: Comparison, console: Console) -> None:
    unequal = [d for d in comparison.differences if d.kind != "equal"]
    for d in unequal[:DIFFERENCES_SHOWN]:
        console.print(f"{d.fqn}: {_difference_words(d)}", markup=False)
    if len(unequal) > DIFFERENCES_SHOWN:
        console.print(f"... and {len(unequal) - DIFFERENCES_SHOWN} more; --json has all")
    if comparison.without_per_rank:
        console.print("different numbers of ranks: what is a rank's own (random states) was not compared")
    count, (a, b) = len(comparison.differences), comparison.steps
    console.print(f"steps {a} and {b}: {count - len(unequal)} of {count} tensors are equal, {len(unequal)} are not")


def _difference_words(d: diff.Difference) -> str:
    match d.kind:
        case "values":
            largest = "not a finite number" if d.max_abs_difference is None else f"{d.max_abs_difference:.6g}"
            return f"{d.n_differing:,} of {d.n_elements:,} elements differ, max abs difference {largest}"
        case "only a":
            return "only in the first"
        case "only b":
            return "only in the second"
        case _:
            return f"{d.kind} differs: {d.detail}"


# --- reshard-plan ----------------------------------------------------------------------------------------------------


def parse_mesh(text: str) -> reshard.Mesh:
    """The mesh of ``pp=2,dp_shard=4``; what is not named is 1."""
    names = [field.name for field in dataclasses.fields(reshard.Mesh)]
    degrees: dict[str, int] = {}
    for piece in text.split(","):
        name, equals, value = (word.strip() for word in piece.partition("="))
        if not equals or name not in names or name in degrees or not value.isascii() or not value.isdigit():
            raise CheckpointsError(
                f"--mesh {text}: write degrees of {', '.join(names)}, each once, as in pp=2,dp_shard=4"
            )
        if not 1 <= int(value) <= 1_000_000:
            raise CheckpointsError(f"--mesh {text}: {name} must be 1 or more, and no more than a million")
        degrees[name] = int(value)
    return reshard.Mesh(**degrees)


def reshard_plan(url: str, step: int | None, mesh: reshard.Mesh) -> reshard.ReshardPlan:
    """What a restore on `mesh` would read. The record of the run's model adds what its tensors do not tell."""
    saved = opened(url, step)
    plan = reshard.plan(saved, mesh)
    heads = _recorded(url).get("model", {}).get("n_kv_heads")
    if isinstance(heads, int) and heads % mesh.tp:
        problem = f"tp = {mesh.tp}: must divide model.n_kv_heads, which is {heads}"
        plan = dataclasses.replace(plan, problems=(*plan.problems, problem), ranks=())
    return plan


def plan_document(plan: reshard.ReshardPlan) -> dict[str, Any]:
    return {
        **dataclasses.asdict(plan),
        "possible": not plan.problems,
        "read_bytes": plan.read_bytes,
        "ranks": [{**dataclasses.asdict(rank), "read_bytes": rank.read_bytes} for rank in plan.ranks],
        "read_per_state_byte": plan.read_bytes / plan.state_bytes if plan.state_bytes else None,
    }


def show_plan(plan: reshard.ReshardPlan, console: Console) -> None:
    words = mesh_words(dataclasses.asdict(plan.mesh))
    if plan.problems:
        console.print(f"{words}: not possible", style="red")
        for problem in plan.problems:
            console.print(problem, markup=False)
        return
    table = Table("rank", "holds", "reads", "of ranks", "is sent", box=None, pad_edge=False)
    for rank in plan.ranks[:RANKS_SHOWN]:
        sources = [int(name.rpartition("rank-")[2].removesuffix(".bin")) for name in rank.files]
        table.add_row(
            str(rank.rank),
            size(rank.state_bytes),
            size(rank.read_bytes),
            _ranges(sources),
            size(rank.received_bytes),
        )
    console.print(table)
    if len(plan.ranks) > RANKS_SHOWN:
        console.print(f"... and {len(plan.ranks) - RANKS_SHOWN} more ranks; --json has all")
    ratio = plan.read_bytes / plan.state_bytes if plan.state_bytes else 0.0
    own = "restored" if plan.per_rank_restored else "left as they are"
    console.print(
        f"{words}: {len(plan.ranks)} ranks read {size(plan.read_bytes)}, {ratio:.2f} times the state of "
        f"{size(plan.state_bytes)}; random states are {own}"
    )


def _ranges(numbers: list[int]) -> str:
    """``0-3, 7``."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


# --- export and import -----------------------------------------------------------------------------------------------


def export_model(
    url: str, step: int | None, to: str, dtype: str, max_shard_bytes: int, model_file: str
) -> tuple[Commit, export.Exported]:
    """Write the parameters of a checkpoint as a Hugging Face model under `to`."""
    if dtype not in ("", "bfloat16", "float32"):
        raise CheckpointsError(f"--dtype {dtype}: choose bfloat16 or float32, or leave it out for the checkpoint's own")
    check_protocol(to)
    with store_errors(to, "--to"):
        export.check_empty(locate(to))
    saved = opened(url, step)
    record = _recorded(url)
    model = dataclasses.asdict(specs.load(model_file).model) if model_file else record.get("model")
    if model is None:
        raise CheckpointsError(
            f"{url}: no record tells the model (run.json, import.json); give its job's file by --model FILE"
        )
    shape = LlamaShape(**{name: model[name] for name in SHAPE_FIELDS})
    per_element = {"bfloat16": 2, "float32": 4}
    total = sum(
        tensor.n_elements * per_element[dtype] if dtype else tensor.n_bytes
        for fqn, tensor in saved.tensors.items()
        if fqn.startswith(MODEL_PREFIX)
    )
    with store_errors(to, "--to"), _damage_in(url), progress_bar("exported", total) as progress:
        done = export.export(
            saved,
            shape,
            to,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            max_positions=int(record.get("data", {}).get("seq_len", MAX_POSITIONS)),
            progress=progress,
        )
    return saved.commit, done


def import_model(source_url: str, to: str, step: int) -> tuple[Commit, str]:
    """Commit a Hugging Face model as the checkpoint of `step` under `to`; with what a job says to start from it."""
    check_protocol(source_url)
    check_protocol(to)
    with store_errors(source_url):
        source = imports.open_source(source_url)
    with store_errors(to, "--to"):
        if journal.exists(to):
            raise CheckpointsError(f"--to {to}: a run was started there; import into a run directory of its own")
        imports.check_unused(to)
    model = dataclasses.asdict(source.shape)
    with store_errors(to, "--to"):
        if not identity.declare_import(to, model):
            raise CheckpointsError(f"--to {to}: another model was imported there; choose another run directory")
        try:
            with progress_bar("imported", source.n_bytes) as progress:
                commit = imports.import_model(source, to, step, "import", progress)
        except BaseException:
            with contextlib.suppress(Exception):
                remove(to, identity.IMPORT_RECORD)
            raise
    return commit, tomli_w.dumps({"run": {"url": to}, "model": model})


def _recorded(url: str) -> dict[str, Any]:
    with store_errors(url):
        return identity.recorded(url)
