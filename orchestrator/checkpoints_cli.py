"""`shepherd checkpoints`: argument parsing and calls, nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from orchestrator.refusals import refuse
from storage.redact import redacted

checkpoints_app = typer.Typer(
    help="Look at the checkpoints under any URL, compare and remove them, take models in and out.",
    no_args_is_help=True,
)

RunUrl = Annotated[str, typer.Argument(help="A run directory: a path or any fsspec URL.", metavar="URL")]
Step = Annotated[int, typer.Argument(help="The checkpoint's step.", metavar="STEP", min=0)]
MaybeStep = Annotated[
    int | None, typer.Argument(help="The checkpoint's step; default: the newest.", metavar="STEP", min=0)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


@checkpoints_app.command("ls")
def ls(url: RunUrl, as_json: AsJson = False) -> None:
    """List what is committed under URL, and what lies there uncommitted."""
    from orchestrator import checkpoints_command as command

    with _refusals():
        found = command.listing(url)
    if as_json:
        _print_json(found.document())
    else:
        command.show_listing(found, _console())


@checkpoints_app.command("verify")
def verify(
    url: RunUrl,
    step: MaybeStep = None,
    every: Annotated[bool, typer.Option("--all", help="Every committed step.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read a checkpoint back and check every digest. Exit code 1 when anything is damaged."""
    from orchestrator import checkpoints_command as command

    with _refusals():
        found = command.verify(url, step, every)
    if as_json:
        _print_json({"whole": not any(found.values()), "problems": found})
    else:
        for number, problems in found.items():
            for problem in problems or ["whole"]:
                print(redacted(f"step {number}: {problem}"))
    raise typer.Exit(1 if any(found.values()) else 0)


@checkpoints_app.command("diff")
def diff(
    first: Annotated[str, typer.Argument(help="URL, or URL@STEP; default: the newest step.", metavar="URL[@STEP]")],
    second: Annotated[str, typer.Argument(help="What to compare it with.", metavar="URL[@STEP]")],
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints by content, whichever meshes wrote them. Exit code 1 when they differ."""
    from orchestrator import checkpoints_content as content

    with _refusals():
        comparison = content.compare(first, second)
    if as_json:
        _print_json(comparison.document())
    else:
        content.show_comparison(comparison, _console())
    raise typer.Exit(0 if comparison.equal else 1)


@checkpoints_app.command("reshard-plan")
def reshard_plan(
    url: RunUrl,
    mesh: Annotated[str, typer.Option(help="Degrees: pp=..,dp_replicate=..,dp_shard=..,tp=..; default of each: 1.")],
    step: MaybeStep = None,
    as_json: AsJson = False,
) -> None:
    """Say what a restore on another mesh would read. Exit code 1 when that mesh cannot hold the state."""
    from orchestrator import checkpoints_content as content

    with _refusals():
        plan = content.reshard_plan(url, step, content.parse_mesh(mesh))
    if as_json:
        _print_json(content.plan_document(plan))
    else:
        content.show_plan(plan, _console())
    raise typer.Exit(1 if plan.problems else 0)


@checkpoints_app.command("export")
def export(
    url: RunUrl,
    to: Annotated[str, typer.Option(help="A new or empty folder: a path or any fsspec URL.")],
    step: MaybeStep = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32; default: as saved.")] = "",
    max_shard_bytes: Annotated[int, typer.Option(help="Bytes of tensors in one file.", min=1)] = 5_000_000_000,
    model: Annotated[str, typer.Option(help="The job's file, where no record under URL tells the model.")] = "",
) -> None:
    """Write a checkpoint's parameters as a Hugging Face Llama (safetensors)."""
    from orchestrator import checkpoints_content as content

    with _refusals():
        commit, done = content.export_model(url, step, to, dtype, max_shard_bytes, model)
    print(redacted(f"{to}: step {commit.step}, {done.tensors} tensors, {done.n_bytes:,} bytes in {done.files} files"))


@checkpoints_app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="A Hugging Face Llama: a folder or any fsspec URL.", metavar="URL")],
    to: Annotated[str, typer.Option(help="The run directory (run.url) of a run that was not started yet.")],
    step: Annotated[int, typer.Option(help="The step that the checkpoint counts as done.", min=0)] = 0,
) -> None:
    """Make a Hugging Face Llama (safetensors) the checkpoint from which a new run starts."""
    from orchestrator import checkpoints_content as content

    with _refusals():
        commit, tables = content.import_model(source, to, step)
    print(redacted(f"{to}: step {commit.step} is committed. `shepherd train` starts from it with a job that says:"))
    print(redacted(f"\n{tables}"), end="")


@checkpoints_app.command("rm")
def rm(
    url: RunUrl,
    steps: Annotated[list[int] | None, typer.Argument(help="Steps to remove.", metavar="STEP...", min=0)] = None,
    leftovers: Annotated[
        bool, typer.Option("--leftovers", help="Also uncommitted folders that were last written two hours ago.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also what is pinned, leftovers of any age, and while a run is or may be live."),
    ] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster on which the run may be live.")] = None,
) -> None:
    """Remove checkpoints: commit record first, then data."""
    from orchestrator import checkpoints_removal as removals
    from orchestrator.checkpoints_command import CheckpointsError

    with _refusals():
        removal = removals.plan_removal(url, steps or [], leftovers, force, asks=not yes, address=address)
        for line in removal.words():
            print(redacted(line))
        if not removal.is_empty:
            if not yes and not _confirmed(redacted(removal.question)):
                raise CheckpointsError("not confirmed, nothing was removed; --yes does not ask")
            removals.perform_removal(removal)
            print("removed")


@checkpoints_app.command("pin")
def pin(
    url: RunUrl,
    step: Step,
    why: Annotated[str, typer.Option(help="For what it is kept.")],
) -> None:
    """Keep a checkpoint from being deleted, by hand or by retention."""
    from orchestrator import checkpoints_removal as removals

    with _refusals():
        removals.pin(url, step, why)
    print(f"step {step} is pinned")


@checkpoints_app.command("unpin")
def unpin(url: RunUrl, step: Step) -> None:
    """Take a pin away."""
    from orchestrator import checkpoints_removal as removals

    with _refusals():
        removals.unpin(url, step)
    print(f"step {step} is not pinned any more")


def _confirmed(question: str) -> bool:
    try:
        return typer.confirm(question)
    except typer.Abort:  # there is nobody to ask
        return False


def _console() -> Console:
    from orchestrator.observe.live import new_console

    return new_console()


def _print_json(document: dict[str, Any]) -> None:
    print(redacted(json.dumps(document, indent=1)))


@contextmanager
def _refusals() -> Iterator[None]:
    """What is the user's to mend: the message, no traceback."""
    from orchestrator.checkpoints_command import CheckpointsError
    from orchestrator.identity import RecordError
    from orchestrator.spec import SpecError
    from storage.hugging_face import FormatError
    from storage.manifest import ManifestError

    try:
        yield
    except (CheckpointsError, FormatError, RecordError, SpecError, ManifestError) as e:
        refuse(str(e), e)
