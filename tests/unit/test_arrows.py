"""Who may import whom: every import statement of the packages, wherever it stands, against the rules of the house."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "storage", "trainer")


@dataclass(frozen=True)
class Rule:
    """Modules under `of` import of our packages only what lies under `only`, and if `pure`, no third party's."""

    of: str
    only: tuple[str, ...]
    pure: bool = False


RULES = (
    Rule("storage", only=("storage",)),
    Rule("storage.manifest", only=(), pure=True),
    Rule("trainer", only=("trainer", "storage")),
    Rule("trainer.contract", only=(), pure=True),
    Rule("orchestrator", only=("orchestrator", "storage", "trainer.contract")),
    Rule("orchestrator.core", only=("orchestrator.core", "trainer.contract", "storage.manifest"), pure=True),
)


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of every import; `from a import b` counts as a.b, which may be a module."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}" if base else alias.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            name = node.args[0]
            yield node.lineno, str(name.value) if isinstance(name, ast.Constant) else ""


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source`, standing at `module`, imports against a rule."""
    found = []
    for line, name in imports(source, module, is_package):
        top = name.split(".")[0]
        for rule in RULES:
            if not under(module, rule.of):
                continue
            if top in PACKAGES and not any(under(name, allowed) for allowed in rule.only):
                found.append(
                    f"{module}:{line} imports {name}; {rule.of} may import {rule.only or 'none of our modules'}"
                )
            if rule.pure and top not in PACKAGES and top not in sys.stdlib_module_names:
                found.append(f"{module}:{line} imports {name}; {rule.of} is pure")
    return found


def modules() -> list[tuple[str, Path]]:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path) for path in files]


def test_there_are_modules_to_look_at():
    names = {name for name, _ in modules()}
    assert {"orchestrator.core.supervisor", "trainer.contract", "storage.manifest", "storage"} <= names
    assert len(names) > 50


def test_no_two_modules_of_tests_have_one_name():
    """pytest imports them by it, and one run of all the tests would end before the first."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 50
    assert not [name for name, n in names.items() if n > 1]


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_run_one_way(package):
    found = []
    for name, path in modules():
        if under(name, package):
            found += violations(path.read_text(), name, path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("storage.ram", "import trainer"),
        ("storage.ram", "from trainer.contract import Assign"),
        ("storage.ram", "def f():\n    from orchestrator.core import events"),
        ("storage.manifest", "from storage import urls"),
        ("storage.manifest", "import torch"),
        ("trainer.loop", "import orchestrator.core.events"),
        ("trainer.loop", "if True:\n    from orchestrator import spec"),
        ("trainer.contract", "from storage.manifest import RankPart"),
        ("trainer.contract", "import pydantic"),
        ("trainer.contract", "from . import loop"),
        ("orchestrator.core.recovery", "import ray"),
        ("orchestrator.core.recovery", "from orchestrator import spec"),
        ("orchestrator.core.recovery", "from orchestrator.runtime.journal import Journal"),
        ("orchestrator.core.recovery", "from storage.urls import probe"),
        ("orchestrator.core.recovery", "from trainer import loop"),
        ("orchestrator.core.recovery", "from ..runtime import journal"),
        ("orchestrator.runtime.agent", "from trainer import worker"),
        ("orchestrator.runtime.agent", "import trainer"),
        ("orchestrator.runtime.agent", "import trainer.data.prepare"),
        ("orchestrator.observe.live", "import importlib\nimportlib.import_module('trainer.llama')"),
        ("orchestrator.cli", "from trainer.contractor import x"),
        ("orchestrator.spec", "from trainer.presets import names"),
        ("orchestrator.preflight", "from trainer.data import corpora"),
        ("orchestrator.chaos.faults", "from trainer.worker import main"),
    ],
)
def test_a_violation_is_seen(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("storage.ram", "import torch\nfrom storage.state import TrainState\nfrom . import urls"),
        ("storage.manifest", "import json\nfrom dataclasses import dataclass"),
        ("trainer.loop", "import torch\nfrom storage import ram\nfrom trainer import optim\nfrom .optim import x"),
        ("trainer.contract", "from __future__ import annotations\nimport socket, struct"),
        (
            "orchestrator.core.state",
            "from trainer.contract import build\nfrom storage.manifest import Commit\nimport json",
        ),
        ("orchestrator.core.state", "from . import events\nfrom .events import Layout"),
        ("orchestrator.runtime.agent", "import ray\nfrom trainer import contract\nfrom storage import peer"),
        ("orchestrator.runtime.agent", "from trainer.contract import Assign"),
    ],
)
def test_what_is_allowed_is_not_refused(module, source):
    assert violations(source, module) == []


def test_the_controller_and_the_command_start_without_torch():
    names = "orchestrator.cli, orchestrator.runtime.driver, orchestrator.runtime.controller, orchestrator.preflight"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0
