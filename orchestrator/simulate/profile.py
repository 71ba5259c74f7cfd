"""What things cost (a profile) and how often what fails, each figure with its source: TOML files beside this one.

Nothing here is measured by the simulator itself: a figure is either somebody's published one, arithmetic on such, or
an assumption, and its `source` says which. A simulated number is worth what these are worth.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

HERE = Path(__file__).resolve().parent

Effect = Literal["node", "worker", "collective", "hang", "slow", "corrupt", "leave", "store"]
Sign = Literal["exit", "network", "hang", "slow", "corruption", "notice"]


class ProfileError(ValueError):
    """The profile is not one. The message has one line for each thing to mend."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_Model = TypeVar("_Model", bound=BaseModel)


class Seconds(_Table):
    value: float = Field(ge=0)
    source: str = Field(min_length=1)

    @property
    def us(self) -> int:
        return round(self.value * 1_000_000)


class Costs(_Table):
    """Seconds that things take."""

    snapshot_stall: Seconds
    """What a snapshot into shared memory adds to its step."""
    save_stall: Seconds
    """What a durable save adds to its step."""
    save_write: Seconds
    """From there until every rank's part is on the store; training goes on."""
    commit: Seconds
    """To create the commit record."""
    halt: Seconds
    """From the order until every node that lives has ended its workers and said what it holds."""
    restart: Seconds
    """From the order to open a generation until its ranks are connected and their model is built."""
    resume: Seconds | None = None
    """The same where the workers that live have parked; left out: this body's do not park."""
    warm_up: Seconds
    """What a generation's first step takes longer; the ledger counts it as that step's."""
    restore_ram: Seconds
    """Each rank's state out of its own node's memory."""
    restore_peer: Seconds
    """On top, where some node's state is copied from other nodes' memory first."""
    restore_durable: Seconds
    """The whole mesh's state from the store."""
    provision: Seconds
    """From a machine that is there to a node that is ready to take a slot."""


class Figure(_Table):
    value: float = Field(gt=0)
    source: str = Field(min_length=1)


class Detection(_Table):
    """Seconds from a failure until the controller knows, by how it shows."""

    exit: Seconds
    """A process or a machine is gone, and its connections are closed."""
    network: Seconds
    """A machine is not to be reached any more."""
    hang: Seconds
    """A process is there and does nothing."""
    corruption: Seconds
    """State is wrong. Zero: the audit finds it in the step under way."""
    notice: Seconds
    """Told beforehand."""
    slow: Seconds | None = None
    """A node computes more slowly than its peers; left out: nobody notices, and no cause may show so."""


class Delivery(_Table):
    """What happens to messages between the nodes and the controller. They are sent until they have arrived."""

    mean_delay: Seconds
    """Exponential. Messages of one sender stay in order, those of different ones do not."""
    retry: Seconds
    """A lost message is sent again after this."""
    lost: float = Field(ge=0, lt=1)
    """The share of messages that are lost, each try anew."""
    repeated: float = Field(ge=0, le=1)
    """The share of messages that arrive a second time, later."""


class ReadBack(_Table):
    """What it takes a node to read a checkpoint back, and what it finds."""

    read: Seconds
    rotten: float = Field(default=0, ge=0, le=1)
    """Of the checkpoints that are read back, the share that is damaged from then on."""
    misread: float = Field(default=0, ge=0, le=1)
    """Of the readings of whole checkpoints, the share in which a node finds damage that is not there."""


class Profile(_Table):
    title: str
    memory: bool
    """Whether state is kept in shared memory and copied between nodes; without, only the store has it."""
    buddies: bool = False
    """Whether each snapshot is copied to one other node as soon as it is taken: what a mesh without replicas needs."""
    shrinks: bool = False
    """Whether the run can go on with fewer nodes: with fewer replicas, which then accumulate more microbatches each, or
    in one of the job's fallback meshes."""
    probes: float | None = Field(default=None, ge=0, le=1)
    """Of quarantined nodes, the share that passes a probe and comes back; left out: none is probed."""
    read_back: ReadBack | None = None
    """Left out: nobody reads checkpoints back but restores."""
    tflops_per_gpu: Figure
    """Floating-point operations of training that a GPU does in a second, in millions of millions: gives the step."""
    costs: Costs
    detection: Detection
    delivery: Delivery | None = None
    """Left out: messages arrive at once and in order."""


class Exposure(_Table):
    """What the counts of the causes were counted over."""

    node_days: float = Field(gt=0)
    source: str = Field(min_length=1)


class Cause(_Table):
    """One kind of failure.

    node: the machine is gone, and back after its repair. worker: a process ends, its node stays. collective: an
    exchange breaks, every process lives. hang: a process stops and does not end. slow: a node computes more slowly.
    corrupt: a node's state is wrong; it is quarantined. leave: a machine will be taken away, and is known to be. store:
    the store does not answer until its repair.
    """

    name: str = Field(min_length=1)
    effect: Effect
    sign: Sign
    count: float = Field(ge=0)
    """Over the exposure."""
    repair_s: float = Field(default=0, ge=0)
    """Until the machine, or one in its place, is there again."""
    machines: int = Field(default=1, ge=1)
    """Neighbouring ones that it strikes at once: a rack's, or those behind a switch."""
    burst: int = Field(default=1, ge=1)
    """Strikes of each time, the others at random within burst_s after the first."""
    burst_s: float = Field(default=0, ge=0)
    slowdown: float = Field(default=0.0, ge=0)
    """slow: how much longer a step takes, as a share of it."""
    notice_s: float = Field(default=0, ge=0)
    """leave: from the notice until the machine is taken, if it has not been let go before."""

    @pydantic.model_validator(mode="after")
    def _does_something(self) -> Cause:
        wants = {"slow": "slowdown", "store": "repair_s", "leave": "notice_s"}.get(self.effect)
        if wants is not None and not getattr(self, wants):
            raise ValueError(f"effect {self.effect!r} wants {wants}, above 0")
        return self

    source: str = Field(min_length=1)


class Failures(_Table):
    title: str
    exposure: Exposure
    machines_per_rack: int = Field(default=0, ge=0)
    """Neighbouring machines in one failure domain, which placement knows; 0: it knows none."""
    causes: tuple[Cause, ...]

    @property
    def per_node_day(self) -> float:
        return sum(cause.count for cause in self.causes) / self.exposure.node_days


def names(kind: Literal["profiles", "failures"]) -> list[str]:
    """Those that come with Shepherd."""
    return sorted(path.stem for path in (HERE / kind).glob("*.toml"))


def load_profile(name: str) -> Profile:
    """The profile of this name, or of the TOML file at this path. Raises ProfileError when it is none."""
    return _load("profiles", name, Profile)


def load_failures(name: str) -> Failures:
    """The failures of this name, or of the TOML file at this path. Raises ProfileError when they are none."""
    return _load("failures", name, Failures)


def _load(kind: Literal["profiles", "failures"], name: str, model: type[_Model]) -> _Model:
    path = HERE / kind / f"{name}.toml" if name in names(kind) else Path(name)
    try:
        document = tomllib.loads(path.read_text())
    except OSError as e:
        raise ProfileError(f"{name}: is no file, and none of Shepherd's own {kind}: {', '.join(names(kind))}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ProfileError(f"{name}: is not TOML: {e}") from e
    try:
        return model.model_validate(document)
    except pydantic.ValidationError as e:
        raise ProfileError(
            "\n".join(f"{name}: {_where(error['loc'], document)}: {error['msg']}" for error in e.errors())
        ) from e


def _where(loc: tuple[int | str, ...], document: dict[str, Any]) -> str:
    """The field, with a cause's name in the place of its number."""
    parts = list(loc)
    if parts[:1] == ["causes"] and len(parts) > 1 and isinstance(parts[1], int):
        causes = document.get("causes")
        cause = causes[parts[1]] if isinstance(causes, list) else None
        if isinstance(cause, dict) and "name" in cause:
            parts[:2] = [f"cause {cause['name']!r}"]
    return ".".join(str(part) for part in parts)
