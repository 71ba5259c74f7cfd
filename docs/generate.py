"""docs/spec.md, drawn from the code: ``python docs/generate.py > docs/spec.md``.

A field's meaning stands in the code once: as the description of a pydantic field, or as the string under a field of a
dataclass (trainer/contract.py keeps free of pydantic).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.spec import PRESETS, JobSpec
from trainer.contract import Degrees

HEAD = """\
# The job's document

Written by `python docs/generate.py > docs/spec.md`; a test fails when it is stale.

A job is one TOML file with the tables below. Only `run.name` is required. `shepherd spec show FILE` prints the whole
effective document, and `shepherd spec check FILE` names every value that cannot be, with what would be valid. A field
is overridden on the command line by `--set section.field=value`, which may be given again. Unknown fields are refused.
A local path that is relative starts from the folder in which the command runs; `~` is each node's own home, except in
`run.url`.

What must fit together:

- `parallel.pp` x `dp_replicate` x `dp_shard` x `tp` is the number of ranks; `cluster.slots_per_node` divides it, and
  the quotient is the number of nodes of the mesh.
- `parallel.tp` divides `cluster.slots_per_node`, `model.n_kv_heads`, `model.ffn_dim`, `model.vocab_size` and
  `data.seq_len`.
- `parallel.dp_replicate` x `dp_shard` x `microbatches` divides `data.global_batch`.
- With `parallel.pp` above 1, `parallel.microbatches` is at least `parallel.pp`.
- Each mesh of `recovery.fallback_meshes` fits in the same way, its microbatches being of the size that `parallel` gives
  them: its slots fill whole nodes, and fewer than those of the mesh before it, which for the first is `parallel` with
  `recovery.min_replicas`.
- With `script.command` the job is [a script of your own](sessions.md): `script.nodes` x `cluster.slots_per_node`
  processes. The sections of the Llama trainer and most of `[run]` must not be set then.
- `recovery.collective_timeout_s` exceeds the slowest step, validation pass or save: a rank that waits longer for a peer
  fails.
"""


def page() -> str:
    """The page, in Markdown."""
    lines = [HEAD]
    for name, field in JobSpec.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type)
        doc = ast.get_docstring(_tree(kind))
        assert doc, f"{kind.__name__} has no docstring"
        lines += [f"## [{name}]", "", *textwrap.wrap(" ".join(doc.split()), 120), ""]
        lines += ["| field | type | default | meaning |", "|---|---|---|---|", *_rows(kind), ""]
    lines += ["## Presets", "", "Names for `model.preset`:", "", *_presets(), ""]
    return "\n".join(lines)


def _rows(kind: type) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for name, default, meaning in _pydantic(kind) if issubclass(kind, BaseModel) else _dataclass(kind):
        assert meaning, f"{kind.__name__}.{name} does not say what it means"
        shown = "required" if default is None else f"`{json.dumps(default)}`"
        yield f"| `{name}` | {_type(hints[name])} | {shown} | {' '.join(meaning.split()).replace('<', '&lt;')} |"


def _pydantic(kind: type[BaseModel]) -> Iterator[tuple[str, Any, str]]:
    fields: dict[str, FieldInfo] = kind.model_fields
    for name, field in fields.items():
        yield name, None if field.is_required() else field.default, field.description or ""


def _dataclass(kind: type) -> Iterator[tuple[str, Any, str]]:
    body = _tree(kind).body
    meanings = {
        field.target.id: below.value.value
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }
    for field in dataclasses.fields(kind):
        yield field.name, field.default, meanings.get(field.name, "")


def _tree(kind: type) -> ast.ClassDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return tree


def _type(hint: Any) -> str:
    if hint == tuple[str, ...]:
        return "list of str"
    if hint == tuple[Degrees, ...]:
        return "list of tables"
    if isinstance(hint, types.GenericAlias) or not isinstance(hint, type):
        assert typing.get_origin(hint) is typing.Literal, hint
        return " or ".join(f"`{json.dumps(value)}`" for value in typing.get_args(hint))
    return hint.__name__


def _presets() -> list[str]:
    names = (f"`{path.stem}`" for path in sorted(PRESETS.glob("*.toml")))
    return textwrap.wrap(", ".join(names) + ".", 120)


if __name__ == "__main__":
    print(page(), end="")
