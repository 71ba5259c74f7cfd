"""Events, actions and the supervisor's state as JSON, and back: what the journal holds.

The JSON objects are plain (lists, string keys), so that one made here equals one that has been written and read.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from typing import Any, TypeVar

from orchestrator.core.actions import Action
from orchestrator.core.events import Event
from orchestrator.core.goodput import LABELS
from orchestrator.core.state import NODE_STATES, VERIFICATIONS, State
from trainer.contract import build, decode

K = TypeVar("K", bound=str)


def event_to_json(event: Event) -> dict[str, Any]:
    """The event's fields and, under "type", its class name."""
    return {"type": type(event).__name__, **_plain(event)}


def event_from_json(document: dict[str, Any]) -> Event:
    """The event of a JSON object made by `event_to_json`.

    Raises:
        ValueError: the type is no event's, or a field is missing or unknown.
    """
    event: Event = decode(document, Event)
    return event


def action_to_json(action: Action) -> dict[str, Any]:
    """The action's fields and, under "type", its class name."""
    return {"type": type(action).__name__, **_plain(action)}


def action_from_json(document: dict[str, Any]) -> Action:
    """The action of a JSON object made by `action_to_json`.

    Raises:
        ValueError: the type is no action's, or a field is missing or unknown.
    """
    action: Action = decode(document, Action)
    return action


def state_to_json(state: State) -> dict[str, Any]:
    """Everything that the supervisor knows. The order of keys is part of it: nodes stand in the order of joining."""
    document: dict[str, Any] = _plain(state)
    return document


def state_from_json(document: dict[str, Any]) -> State:
    """The state of a JSON object made by `state_to_json`, by this code or by older code.

    What older code did not know has its default: a field with one, and a count under a new name.

    Raises:
        ValueError: a field without default is missing, or a field, a node's state or a label is unknown.
    """
    state = build(State, document)
    state.counts = _counted(state.counts, NODE_STATES)
    state.verifications = _counted(state.verifications, VERIFICATIONS)
    state.ledger.totals = _counted(state.ledger.totals, LABELS)
    return state


def _counted(counts: dict[K, int], names: Iterable[K]) -> dict[K, int]:
    """The count of each name, in the order of `names`."""
    counted = {name: counts.get(name, 0) for name in names}
    unknown = [name for name in counts if name not in counted]
    if unknown:
        raise ValueError(f"counts of {unknown}, which are none of {list(counted)}")
    return counted


def digest(state: State) -> str:
    """SHA-256 of the state's JSON, keys in their own order: equal states decide equally ever after."""
    return hashlib.sha256(json.dumps(state_to_json(state), separators=(",", ":")).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    names = _field_names(type(value))  # type: ignore[arg-type]
    return {name: _plain(getattr(value, name)) for name in names}


@functools.cache
def _field_names(kind: type) -> tuple[str, ...]:
    """A state of 12,500 nodes asks as often."""
    return tuple(f.name for f in dataclasses.fields(kind))
