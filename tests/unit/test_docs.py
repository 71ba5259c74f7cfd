"""README and docs say what the code says: fields, metrics, labels, exit codes, commands, links."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_exporter import ENDED, spec
from typer.core import TyperGroup
from typer.main import get_command

from orchestrator import cli
from orchestrator.core import state
from orchestrator.core.goodput import LABELS
from orchestrator.observe.exporter import CAUSES, families
from orchestrator.spec import load
from trainer import contract

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("orchestrator", "trainer", "storage", "tests", "benchmarks", "deploy", "docs")
CODE = "\n".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
README = (ROOT / "README.md").read_text()
EXIT_CODES = (ROOT / "docs" / "exit-codes.md").read_text()


def test_the_page_of_fields_is_not_stale() -> None:
    script = ROOT / "docs" / "generate.py"
    made = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, timeout=240, check=True)
    assert (ROOT / "docs" / "spec.md").read_text() == made.stdout, "run: python docs/generate.py > docs/spec.md"


def test_the_page_of_fields_has_them_all() -> None:
    page = (ROOT / "docs" / "spec.md").read_text()
    sections = dict(re.findall(r"^## \[(\w+)\]\n(.*?)(?=^## )", page, re.M | re.S))
    document = load(ROOT / "examples" / "train.toml").document()
    assert {name: set(re.findall(r"^\| `(\w+)` \|", text, re.M)) for name, text in sections.items()} == {
        name: set(fields) for name, fields in document.items()
    }


def test_the_page_of_metrics_is_the_exporters() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    rows = re.findall(r"^\| `(shepherd_\w+)(?:\{([a-z,]+)\})?` \| (\w+) \| (.*) \|$", page, re.M)
    served = [
        (
            f.name + "_total" * (f.type == "counter"),
            ",".join(label for label in f.samples[0].labels if label != "run"),
            f.type,
            f.documentation,
        )
        for f in families(ENDED, spec())
    ]
    assert rows == served
    assert dict(re.findall(r"^\| `([a-z]+)` \| (.*) \|$", page, re.M)) == CAUSES


def test_the_readme_names_no_metric_that_is_not_served() -> None:
    served = {f.name + "_total" * (f.type == "counter") for f in families(ENDED, spec())}
    assert {"shepherd_goodput_ratio"} <= set(re.findall(r"shepherd_[a-z_]+", README)) <= served


def test_the_readme_has_the_ledgers_labels() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.M))
    assert {label: rows[label] for label in LABELS} == LABELS


@pytest.mark.parametrize(("kind", "codes"), [("run", {**vars(state), **vars(cli)}), ("worker", vars(contract))])
def test_every_exit_code_is_documented_with_its_name(kind: str, codes: dict[str, object]) -> None:
    of_runs, _, of_workers = EXIT_CODES.partition("## Worker processes")
    rows = re.findall(r"^\| (\d+) \| `(EXIT_\w+)` \|", of_runs if kind == "run" else of_workers, re.M)
    assert {name: int(code) for code, name in rows} == {n: c for n, c in codes.items() if n.startswith("EXIT_")}


def test_the_readme_has_every_exit_code() -> None:
    table = README.partition("## Exit codes")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| (\d+) \| `EXIT_\w+` \|", EXIT_CODES.partition("## Worker")[0], re.M)
    assert re.findall(r"^\| (\d+) \|", table, re.M) == documented


def test_the_readme_has_every_command() -> None:
    group = get_command(cli.app)
    assert set(re.findall(r"shepherd (\w+)", README)) >= set(group.commands) - {"demo"}  # that one is `make demo`
    for words in re.findall(r"shepherd ([a-z][^`\n#]*)", README):
        name, *arguments = words.partition(" -- ")[0].split()
        if name in group.commands:
            command = group.commands[name]
            if isinstance(command, TyperGroup) and arguments:
                command = command.commands[arguments.pop(0)]
            options = {option for p in command.params for option in p.opts}
            assert {a for a in arguments if a.startswith("--")} <= options, f"shepherd {words}"


def test_the_page_on_checkpoints_has_every_command_on_them() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    group = get_command(cli.app).commands["checkpoints"]
    rows = re.findall(r"^\| (`.*?) \| ", page.partition("## The command")[2], re.M)
    told = {word for row in rows for word in re.findall(r"`(\w[\w-]*) URL", row)}
    assert told == set(group.commands)
    for row in rows:
        command = group.commands[re.findall(r"`(\w[\w-]*)", row)[0]]
        assert set(re.findall(r"--[\w-]+", row)) <= {option for p in command.params for option in p.opts}, row


def test_the_example_is_a_job_that_can_run() -> None:
    example = ROOT / "examples" / "train.toml"
    assert load(example).run.name == "train"
    assert tomllib.loads(example.read_text())["data"]["corpus"] == "python-stdlib", "it must run as it is"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_functions_that_a_page_names_exist(page: Path) -> None:
    """`a/b.py`, and `a/b.py: name` or `Class.method` beside it, are true as written."""
    for path, name in re.findall(r"`((?:[\w-]+/)+[\w-]+\.\w+)(?:: (\w+))?`", page.read_text()):
        file = next((f for f in (ROOT / path, ROOT / "orchestrator" / path) if f.exists()), None)
        assert file is not None, f"{page.name}: {path}"
        assert not name or re.search(rf"\b(def|class) {name}\b", file.read_text()), f"{page.name}: {path}: {name}"
    for owner, name in re.findall(r"`([A-Z]\w+)\.(\w+)(?:\(\))?`", page.read_text()):
        assert re.search(rf"class {owner}\b", CODE), f"{page.name}: {owner}"
        assert re.search(rf"def {name}\b", CODE), f"{page.name}: {owner}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_not_too_long(page: Path) -> None:
    """Tables and output are as wide as they are."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []
