"""Shepherd's name for scripts: `import shepherd`.

    spec = shepherd.load("job.toml", ["run.steps=200"])

gives a job as one validated document, as the `shepherd` command reads it.
"""

from orchestrator.spec import JobSpec, SpecError, load, parse

__all__ = ["JobSpec", "SpecError", "load", "parse"]
