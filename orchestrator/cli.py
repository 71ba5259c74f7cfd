"""The `shepherd` command: argument parsing and calls, nothing else. `python -m orchestrator` is the same."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tomli_w
import typer
from rich.console import Console

from orchestrator import spec as specs
from orchestrator.chaos.orders import (
    CUT_FROM,
    DIRECTIONS,
    LASTING,
    OF_A_NODE,
    PATTERNS,
    PROCESSES,
    SCENARIOS,
    TENSORS,
    Order,
)
from orchestrator.checkpoints_cli import checkpoints_app
from orchestrator.refusals import EXIT_REFUSED, refuse
from orchestrator.spec import JobSpec, SpecError
from storage.redact import redact_logging, redacted

if TYPE_CHECKING:
    from orchestrator.simulate.body import Scenario

app = typer.Typer(
    help="Shepherd: fault-tolerant training of Llama models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
spec_app = typer.Typer(help="Look at a job before it runs.", no_args_is_help=True)
app.add_typer(spec_app, name="spec")
app.add_typer(checkpoints_app, name="checkpoints")

SpecFile = Annotated[str, typer.Argument(help="The job: a TOML file or its fsspec URL.", metavar="SPEC")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: section.key=value. May be given again.")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, or the one on this machine.")]
Gpus = Annotated[int | None, typer.Option(help="Scale parallel.dp_replicate to a mesh of this many GPUs.")]
Costs = Annotated[str, typer.Option("--profile", help="What things cost: a name or a TOML file.")]
Failures = Annotated[str, typer.Option(help="What fails how often: a name or a TOML file.")]
RunName = Annotated[str, typer.Argument(help="The run's name (run.name).", metavar="RUN")]


@spec_app.command("check")
def spec_check(file: SpecFile, set_: Overrides = None) -> None:
    """Say whether SPEC is a job that can run, and what to mend if not."""
    spec = _load(file, set_)
    layout = spec.layout
    what = shlex.join(spec.script.command) if spec.is_script else f"{spec.run.steps} steps"
    fewer = f"at least {layout.smallest.nodes} nodes when some are lost, " if layout.smallest != layout else ""
    print(
        f"{file}: ok. {layout.slots} slots on {layout.nodes} nodes of {layout.slots_per_node}, {layout.spares} spares, "
        f"{fewer}{what} to {redacted(spec.run.url)}"
    )


@spec_app.command("show")
def spec_show(file: SpecFile, set_: Overrides = None) -> None:
    """Print the whole effective document, defaults included, as TOML."""
    print(tomli_w.dumps(_load(file, set_).document()), end="")


@app.command()
def train(
    file: SpecFile,
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run, and say what was lost.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Leave the run to itself once it has started.")] = False,
    address: Address = None,
) -> None:
    """Train the job SPEC on a Ray cluster, to its end."""
    _start(_load(file, set_), resume, detach, address)


@app.command()
def run(
    command: Annotated[
        list[str] | None, typer.Argument(help="python, your script and its arguments.", metavar="-- COMMAND")
    ] = None,
    file: Annotated[str, typer.Option("--spec", help="A job that has the rest: a TOML file or its fsspec URL.")] = "",
    nodes: Annotated[int | None, typer.Option(help="Nodes (script.nodes); default 1.")] = None,
    procs_per_node: Annotated[
        int | None, typer.Option(help="Processes on each (cluster.slots_per_node); default 1.")
    ] = None,
    name: Annotated[str, typer.Option(help="The run's name (run.name); default: the script's and the time.")] = "",
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of this --name.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Leave the run to itself once it has started.")] = False,
    address: Address = None,
) -> None:
    """Run a training script of your own on a Ray cluster, as torchrun would, and keep it going."""
    from orchestrator import scripts

    with _refusals():
        spec = scripts.spec_of_command(
            command or [],
            file=file,
            overrides=set_ or [],
            name=name,
            nodes=nodes,
            procs_per_node=procs_per_node,
            resume=resume,
        )
    _start(spec, resume, detach, address)


def _start(spec: JobSpec, resume: bool, detach: bool, address: str | None) -> None:
    """Start a run and, unless it is detached, stay with it."""
    from orchestrator import preflight
    from orchestrator import resume as resumes
    from orchestrator.observe import live
    from orchestrator.runtime import driver

    with _refusals():
        preflight.check_local(spec, resume)
        driver.connect(address)
        preflight.check_cluster(spec)
        lost = resumes.statement(spec) if resume else []
        controller, token = driver.start(spec, detached=detach)
    with live.may_be_lost():
        for line in lost:
            print(f"resume: {redacted(line)}", flush=True)
    try:
        if detach:
            status = driver.begun(spec.run.name, controller)
        else:
            with live.view(spec) as show:
                status = driver.follow(spec.run.name, controller, token, show)
    except driver.ControllerLost as e:
        Console(stderr=True, highlight=False, soft_wrap=True).print("error:", str(e), style="red", markup=False)
        raise typer.Exit(1) from e
    if detach and not status.failure:
        how = f"holds: {status.hold}" if status.hold else "is under way"
        print(f"run {spec.run.name} {how}; `shepherd status {spec.run.name}` tells how it is")
        return
    live.print_end(status, str(driver.run_log_dir(spec)))
    raise typer.Exit(1 if status.failure or status.exit_code is None else status.exit_code)


@app.command()
def doctor(
    file: SpecFile,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    address: Address = None,
) -> None:
    """Look at every node that the job SPEC could take, before it does, and say what to do."""
    spec = _load(file, set_)
    from orchestrator import doctor as doctors
    from orchestrator.runtime import driver

    with _refusals():
        driver.connect(address)
        findings = doctors.examine(spec)
    if as_json:
        print(json.dumps(doctors.document(spec, findings), indent=1))
    else:
        doctors.show(spec, findings)
    raise typer.Exit(1 if doctors.verdict(findings) == "problem" else 0)


@app.command()
def status(
    run: RunName,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole picture as JSON.")] = False,
    address: Address = None,
) -> None:
    """Show how an active run is."""
    from orchestrator.observe import live
    from orchestrator.runtime import driver

    with _refusals():
        driver.connect(address)
        picture, _ = driver.poll(driver.find(run))
    if as_json:
        print(json.dumps(picture.document(), indent=1))
    else:
        live.print_status(picture)


@app.command()
def stop(
    run: RunName,
    now: Annotated[bool, typer.Option("--now", help="End at once, without a checkpoint.")] = False,
    log_dir: Annotated[str, typer.Option(help="cluster.log_dir of the run, where its token is.")] = (
        specs.ClusterSection().log_dir
    ),
    address: Address = None,
) -> None:
    """End an active run: at the next step boundary with a checkpoint, so that --resume can go on from there."""
    from orchestrator.runtime import driver

    with _refusals():
        driver.connect(address)
        driver.stop(driver.find(run), driver.read_token(log_dir, run), by="shepherd stop", graceful=not now)
    print(f"run {run} has been asked to stop")


@app.command()
def drain(
    run: RunName,
    node: Annotated[
        str, typer.Argument(help="The node, as `shepherd status` names it, or its id in Ray.", metavar="NODE")
    ],
    log_dir: Annotated[str, typer.Option(help="cluster.log_dir of the run, where its token is.")] = (
        specs.ClusterSection().log_dir
    ),
    address: Address = None,
) -> None:
    """Take a node out of an active run: it is let go once another has its place, which costs a few steps at most."""
    from orchestrator.runtime import driver

    with _refusals(ValueError):
        driver.connect(address)
        driver.drain(driver.find(run), driver.read_token(log_dir, run), node, by="shepherd drain")
    print(f"run {run} has been asked to let {node} go")


@app.command()
def update(
    run: RunName,
    set_: Overrides = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="A folder with the packages that the workers shall import: a newer trainer.")
    ] = None,
    log_dir: Annotated[str, typer.Option(help="cluster.log_dir of the run, where its token is.")] = (
        specs.ClusterSection().log_dir
    ),
    address: Address = None,
) -> None:
    """Change an active run's job, or its workers' code, from the next step boundary on. No step is lost."""
    from orchestrator.runtime import code as codes
    from orchestrator.runtime import driver

    with _refusals(ValueError):
        packet = codes.pack(working_dir) if working_dir is not None else None
        driver.connect(address)
        controller, token = driver.find(run), driver.read_token(log_dir, run)
        code = codes.publish(driver.where(controller, token), packet) if packet is not None else None
        changes = driver.update(controller, token, set_ or [], code, by="shepherd update")
    for line in changes:
        print(line)
    print(f"run {run} goes on so from its next step boundary")


@app.command()
def chaos(
    scenario: Annotated[str, typer.Argument(help=f"What to do: {', '.join(SCENARIOS)}.", metavar="SCENARIO")],
    run: Annotated[str, typer.Option(help="The run's name (run.name).")],
    rank: Annotated[int | None, typer.Option(help="The rank to hurt; default: drawn by --seed.")] = None,
    node: Annotated[
        str, typer.Option(help=f"For {', '.join(OF_A_NODE)}: the node; default: one of the mesh, drawn by --seed.")
    ] = "",
    times: Annotated[int, typer.Option(help="How often.", min=1, max=1000)] = 1,
    every: Annotated[float, typer.Option(help="Seconds from one to the next, and until the run trains.", min=0)] = 30.0,
    seed: Annotated[int, typer.Option(help="Draws what is left open; counts up with --times.")] = 0,
    tensors: Annotated[str, typer.Option(help=f"For flip: {', '.join(TENSORS)}.")] = "any",
    pattern: Annotated[str, typer.Option(help=f"For flip: {', '.join(PATTERNS)}.")] = "bit",
    seconds: Annotated[
        float, typer.Option(help=f"For {', '.join(LASTING)}: how long. For clock-jump: how far; negative: back.")
    ] = 30.0,
    ballast_gib: Annotated[float, typer.Option(help="For disk-full: more free space than this is not filled.")] = 10.0,
    process: Annotated[str, typer.Option(help=f"For clock-jump: {', '.join(PROCESSES)}.")] = "worker",
    cut_from: Annotated[str, typer.Option("--from", help=f"For net-cut: {', '.join(CUT_FROM)}.")] = "peers",
    direction: Annotated[str, typer.Option(help=f"For net-cut: {', '.join(DIRECTIONS)}, seen from the node.")] = "both",
    delay_ms: Annotated[int, typer.Option(help="For net-delay: how late packets are that leave the node.")] = 200,
    wait: Annotated[float, typer.Option(help="Seconds to wait for recovery, and with --against for the end.")] = 600.0,
    against: Annotated[str, typer.Option(help="run.url of an untouched run, to compare the final state with.")] = "",
    log_dir: Annotated[str, typer.Option(help="cluster.log_dir of the run, where its token is.")] = (
        specs.ClusterSection().log_dir
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the scorecard as JSON.")] = False,
    address: Address = None,
) -> None:
    """Hurt an active run on purpose, and score how it takes it. Exit code 1 when anything was missed."""
    from orchestrator.chaos import command, scorecard
    from orchestrator.observe import live
    from orchestrator.runtime import driver

    order = Order(
        scenario=scenario,
        rank=rank,
        node=node,
        seed=seed,
        tensors=tensors,
        pattern=pattern,
        seconds=seconds,
        ballast_bytes=int(ballast_gib * 2**30),
        process=process,
        cut_from=cut_from,
        direction=direction,
        delay_ms=delay_ms,
    )
    news = Console(stderr=True, highlight=False, soft_wrap=True)
    with _refusals():
        driver.connect(address)
        outcome = command.run(
            run,
            order,
            times=times,
            every_s=every,
            wait_s=wait,
            against=against,
            log_dir=log_dir,
            tell=lambda line: news.print(line, markup=False),
        )
    if as_json:
        print(json.dumps(outcome.document(), indent=1))
    else:
        scorecard.show(live.new_console(), outcome.scores, outcome.note)
    raise typer.Exit(0 if outcome.passed else 1)


@app.command()
def report(
    run: Annotated[
        str, typer.Argument(help="A run directory (path or fsspec URL), or the name of an active run.", metavar="RUN")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    log_dir: Annotated[str, typer.Option(help="cluster.log_dir of the run: its token, its newest records.")] = (
        specs.ClusterSection().log_dir
    ),
    address: Address = None,
) -> None:
    """Write one self-contained HTML page about a run, from its journal."""
    from orchestrator.observe import report as reports

    with _refusals(reports.ReportError):
        reports.write_report(reports.locate(run, log_dir, address), out, log_dir)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


@app.command()
def simulate(
    file: SpecFile,
    set_: Overrides = None,
    gpus: Gpus = None,
    days: Annotated[float, typer.Option(help="Days of virtual time.", min=0.01, max=3650)] = 30,
    seed: Annotated[int, typer.Option(help="One seed, one history.", min=0)] = 0,
    costs: Costs = "shepherd",
    failures: Failures = "llama3",
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the outcome as JSON to this file.")] = None,
) -> None:
    """Run the job SPEC in virtual time, under published failure rates, with the supervisor that real runs have."""
    from orchestrator.observe import live
    from orchestrator.simulate import outcome

    done = outcome.simulate(_scenario(file, set_, gpus, costs, failures, days=days, seed=seed))
    outcome.show(done, live.new_console())
    _write_json(json_, done.document())


@app.command()
def plan(
    file: SpecFile,
    set_: Overrides = None,
    gpus: Gpus = None,
    target: Annotated[float, typer.Option(help="The goodput that is wanted.", min=0.01, max=0.9999)] = 0.95,
    mtbf: Annotated[
        float | None, typer.Option(help="Hours between failures of the mesh; scales all causes alike.", min=0.001)
    ] = None,
    journal: Annotated[
        str | None, typer.Option(help="A run directory: costs and failures as that run's journal has measured them.")
    ] = None,
    costs: Costs = "shepherd",
    failures: Failures = "llama3",
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the plan as JSON to this file.")] = None,
) -> None:
    """Say what goodput the job SPEC can expect, which spares and intervals it wants, and what would help most."""
    from orchestrator.observe import live
    from orchestrator.simulate import journaled as journals
    from orchestrator.simulate import plan as plans
    from orchestrator.simulate.measured import NotMeasured
    from orchestrator.simulate.profile import ProfileError

    made, console = _scenario(file, set_, gpus, costs, failures), live.new_console()
    with _refusals(ProfileError, NotMeasured):
        journaled = None if journal is None else journals.read(journal, made)
        made = made if journaled is None else journaled.scenario
        made = made if mtbf is None else plans.with_mtbf(made, mtbf)
    found = plans.make_plan(made, target)
    document = found.document()
    if journaled is not None:
        ends = journals.at_ends(journaled, target) if journaled.failures and mtbf is None else ()
        journals.show(journaled, ends, console)
        document["journal"] = journals.document(journaled, ends)
    plans.show(found, console)
    _write_json(json_, document)


@app.command()
def demo(
    steps: Annotated[int, typer.Option(help="Training steps of each of the two runs.", min=20)] = 60,
    out: Annotated[Path, typer.Option(help="Folder of the runs; made anew.")] = Path("out/demo"),
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the outcome as JSON to this file.")] = None,
) -> None:
    """Train on a local cluster, hurt the run in four ways, prove that nothing was lost, and write its report."""
    from orchestrator import localcluster

    localcluster.isolate()
    from orchestrator import demo as demos

    with _refusals():
        outcome = demos.run(steps, out.absolute())
    demos.show(outcome)
    _write_json(json_, outcome.document())
    raise typer.Exit(0 if outcome.holds else 1)


def _load(file: str, overrides: list[str] | None) -> JobSpec:
    with _refusals():
        return specs.load(file, overrides)


def _scenario(
    file: str, overrides: list[str] | None, gpus: int | None, costs: str, failures: str, days: float = 1, seed: int = 0
) -> Scenario:
    from orchestrator.simulate import profile, scenario

    with _refusals(profile.ProfileError):
        spec = _load(file, overrides)
        if gpus is not None:
            spec = _load(file, [*(overrides or []), scenario.scaled(spec, gpus)])
        return scenario.of_spec(spec, profile.load_profile(costs), profile.load_failures(failures), days, seed)


def _write_json(path: Path | None, document: dict[str, Any]) -> None:
    """Where a file was asked for."""
    if path is None:
        return
    with _refusals():
        path = path.expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


@contextmanager
def _refusals(*also: type[Exception]) -> Iterator[None]:
    """Errors that are the user's to mend: the message, no traceback."""
    from ray.exceptions import GetTimeoutError, RayActorError

    from orchestrator.preflight import PreflightError
    from orchestrator.runtime.driver import RunError
    from orchestrator.runtime.journal import JournalError
    from storage.manifest import ManifestError
    from storage.urls import StoreError

    own = (SpecError, PreflightError, RunError, StoreError, JournalError, ManifestError, ImportError)
    refusals: tuple[type[Exception], ...] = (*own, OSError, *also)
    try:
        yield
    except BrokenPipeError:  # of the command's own output
        raise
    except (RayActorError, GetTimeoutError) as e:  # the latter is an OSError, too
        refuse("the run's controller does not answer: it is busy, or was killed and comes back; try again", e)
    except refusals as e:
        refuse(str(e) or repr(e), e)


def main() -> None:
    """Entry point of the console script."""
    redact_logging()
    sys.exit(typer.main.get_command(app)())  # `app()` would put typer's own hook for uncaught errors before ours


__all__ = ["EXIT_REFUSED", "app", "main"]

if __name__ == "__main__":
    main()
