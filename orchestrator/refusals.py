"""How the `shepherd` command refuses: a line for each thing to mend, and exit code 2."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console

from storage.redact import redacted

EXIT_REFUSED = 2
"""The document, the machine or the cluster is not as it must be; nothing was started."""


def refuse(why: str, error: Exception) -> NoReturn:
    """Print each line of `why`, without the secrets of URLs, and leave."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for line in redacted(why).splitlines():
        console.print("error:", line, style="red", markup=False)
    raise typer.Exit(EXIT_REFUSED) from error
