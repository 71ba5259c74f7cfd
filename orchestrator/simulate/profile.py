"""What things cost (a profile) and how often what fails, each figure with its source: TOML files beside this one.

Nothing here is measured by the simulator itself: a figure is either somebody's published one, arithmetic on such, or
an assumption, and its `source` says which. A simulated number is worth what these are worth.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

HERE = Path(__file__).resolve().parent

Effect = Literal["node", "worker", "hang", "corrupt"]
Sign = Literal["exit", "network", "hang", "corruption", "notice"]


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


class Profile(_Table):
    title: str
    memory: bool
    """Whether state is kept in shared memory and copied between nodes; without, only the store has it."""
    tflops_per_gpu: Figure
    """Floating-point operations of training that a GPU does in a second, in millions of millions: gives the step."""
    costs: Costs
    detection: Detection


class Exposure(_Table):
    """What the counts of the causes were counted over."""

    node_days: float = Field(gt=0)
    source: str = Field(min_length=1)


class Cause(_Table):
    """One kind of failure.

    node: the machine is gone, and back after its repair. worker: a process ends, its node stays. hang: a process stops
    and does not end. corrupt: a node's state is wrong; it is quarantined.
    """

    name: str = Field(min_length=1)
    effect: Effect
    sign: Sign
    count: float = Field(ge=0)
    """Over the exposure."""
    repair_s: float = Field(default=0, ge=0)
    """Until the machine, or one in its place, is there again."""
    source: str = Field(min_length=1)


class Failures(_Table):
    title: str
    exposure: Exposure
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
        lines = (f"{name}: {'.'.join(str(part) for part in error['loc'])}: {error['msg']}" for error in e.errors())
        raise ProfileError("\n".join(lines)) from e
