"""Shepherd's name for scripts: `import shepherd`.

    session = shepherd.session()

is what a training script calls (docs/sessions.md), and importing it costs nothing. And

    spec = shepherd.load("job.toml", ["run.steps=200"])

gives a job as one validated document, as the `shepherd` command reads it.
"""

from typing import TYPE_CHECKING, Any

from trainer.session import Session, session

if TYPE_CHECKING:
    from orchestrator.spec import JobSpec, SpecError, load, parse

__all__ = ["JobSpec", "Session", "SpecError", "load", "parse", "session"]


def __getattr__(name: str) -> Any:
    """What needs the whole document model is imported when it is asked for."""
    if name in ("JobSpec", "SpecError", "load", "parse"):
        from orchestrator import spec

        return getattr(spec, name)
    raise AttributeError(f"module 'shepherd' has no attribute {name!r}")
