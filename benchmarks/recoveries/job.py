"""The job that all contestants train: one model, data, mesh and optimizer, made by this repository."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.spec import JobSpec, parse

SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small": ({"preset": "demo_5m"}, {"seq_len": 128, "global_batch": 8}),
    "compute": (
        {"dim": 1024, "n_layers": 4, "n_heads": 16, "n_kv_heads": 4, "ffn_dim": 2816, "vocab_size": 4096},
        {"seq_len": 256, "global_batch": 8},
    ),
}
"""Model and data: 5 million parameters, where a step is mostly latency; 53 million, where it is mostly arithmetic."""

LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "full": ({"pp": 2, "dp_replicate": 2, "tp": 2, "microbatches": 2}, 2),
    "small": ({"pp": 2, "dp_replicate": 2, "microbatches": 2}, 2),
    "dp": ({"dp_replicate": 4, "microbatches": 1}, 1),
}
"""The mesh, and how many of its ranks share a node."""


@dataclass(frozen=True)
class Job:
    size: str
    layout: str
    steps: int
    save_every: int
    """Steps between durable checkpoints, ours and theirs."""
    folder: Path
    """Of this run alone."""
    spares: int = 0
    """Nodes beyond those of the layout."""
    keep: int = 3
    """Of our durable checkpoints."""

    @property
    def marks(self) -> Path:
        return self.folder / "marks"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def world_size(self) -> int:
        mesh = LAYOUTS[self.layout][0]
        return mesh.get("pp", 1) * mesh.get("dp_replicate", 1) * mesh.get("tp", 1)

    @property
    def slots_per_node(self) -> int:
        return LAYOUTS[self.layout][1]

    @property
    def nodes(self) -> int:
        return self.world_size // self.slots_per_node

    def spec(self) -> JobSpec:
        """What Shepherd is given; where nothing stands here, its defaults hold."""
        model, data = SIZES[self.size]
        return parse(
            {
                # A name of its own: what a run leaves in shared memory bears it.
                "run": {
                    "name": f"recovery-{self.folder.name}",
                    "url": str(self.folder / "run"),
                    "steps": self.steps,
                    "seed": 1,
                    "validation_interval_steps": self.steps,
                },
                "model": model,
                "data": {
                    **data,
                    "corpus": str(self.folder.parent / "corpus"),
                    "cache_dir": str(self.folder.parent / "data"),
                    "validation_batches": 1,
                },
                "parallel": LAYOUTS[self.layout][0],
                "optimizer": {"lr": 3e-3, "warmup_steps": min(20, self.steps // 4)},
                "checkpoint": {"interval_steps": self.save_every, "keep": self.keep},
                "cluster": {
                    "slots_per_node": self.slots_per_node,
                    "spares": self.spares,
                    "log_dir": str(self.folder / "logs"),
                    "ram_dir": f"/dev/shm/{self.folder.name}",
                },
            }
        )

    def prepare(self) -> None:
        """Write the corpus, the prepared data and what the peers' ranks read: `job.json`."""
        corpus = self.folder.parent / "corpus"
        self.folder.mkdir(parents=True)
        if not corpus.exists():
            write_corpus(corpus)
        spec = self.spec()
        config = spec.worker_config
        wanted = {"data": dataclasses.asdict(config.data), "vocab_size": config.model.vocab_size, "seed": config.seed}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "trainer.data.prepare"],
            input=json.dumps(wanted),
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise SystemExit(f"the data cannot be prepared: {done.stderr}")
        document = {
            "config": dataclasses.asdict(config),
            "marks": str(self.marks),
            "checkpoints": str(self.checkpoints),
            "save_every": self.save_every,
        }
        (self.folder / "job.json").write_text(json.dumps(document, indent=1))


def write_corpus(folder: Path) -> None:
    """Two megabytes of text that can be learned, the same each time."""
    folder.mkdir()
    for document in range(80):
        words = ((document * 7 + n * n) % 997 for n in range(2000))
        text = " ".join(f"Sheep {word} follows sheep {word * 3 % 991}." for word in words)
        (folder / f"{document:02d}.txt").write_text(text)
