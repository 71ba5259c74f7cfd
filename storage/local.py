"""The local disk tier: what a node's ranks have saved stays on the node's own disk, too. No torch.

Under ``<checkpoint.local_dir>/<run>`` files have the names that they have under ``run.url``. It is a cache: what lies
there is used only as far as its content is what the checkpoint in the store says, and nothing counts on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from storage.blocks import Copy, Distance, StoreSource
from storage.index import Index
from storage.manifest import DATA_DIR, ManifestError
from storage.ram import safe_name
from storage.urls import locate

log = logging.getLogger(__name__)

_STEP_FOLDER = re.compile(r"step-(\d{8,})-e\d+-g\d+")


@dataclass(frozen=True)
class LocalTier:
    """`root` of one run on this node; `keep`: how many steps stay, the newest."""

    root: str
    keep: int

    @staticmethod
    def of(local_dir: str, run: str, url: str, keep: int) -> LocalTier | None:
        """The tier of the run `run` under `url`; None when there is no `local_dir`."""
        if not local_dir:
            return None
        key = hashlib.sha256(url.encode()).hexdigest()[:8]
        return LocalTier(str(Path(local_dir).expanduser() / f"{safe_name(run)}-{key}"), keep)

    def path(self, name: str) -> Path:
        return Path(locate(self.root).path(name))

    def copy(self, index_name: str) -> Copy | None:
        """The part whose index has this name, when this node has it: of whatever content."""
        try:
            index = Index.from_json(self.path(index_name).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ManifestError) as e:
            log.warning("not used, the store serves: %s: %s", self.path(index_name), e)
            return None
        return Copy(index, StoreSource(locate(self.root)), Distance.DISK)

    def drop(self, *names: str) -> None:
        """Remove files, as far as the disk lets us."""
        for name in names:
            with contextlib.suppress(OSError):
                self.path(name).unlink()

    def prune(self, step: int) -> None:
        """Remove the parts of all but the `keep` newest steps up to `step`, which is being saved. Later ones are of a
        history that was given up. Other ranks may do the same meanwhile."""
        folder = self.path(DATA_DIR)
        with contextlib.suppress(FileNotFoundError):
            found = [match for name in os.listdir(folder) if (match := _STEP_FOLDER.fullmatch(name))]
            kept = sorted({n for match in found if (n := int(match.group(1))) <= step})[-self.keep :]
            for match in found:
                if int(match.group(1)) not in kept:
                    shutil.rmtree(folder / match.group(), ignore_errors=True)
