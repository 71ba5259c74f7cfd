"""`python -m orchestrator`: the `shepherd` command without an installed script, as `ray job submit` runs it."""

from orchestrator.cli import main

main()
