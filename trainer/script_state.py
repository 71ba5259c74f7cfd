"""The state of a user's script, as it comes and as storage knows it: named tensors, and the rest as JSON.

Pure but for the objects that it asks for their `state_dict`.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from storage.manifest import ManifestError, StateMismatch
from storage.state import TrainState
from trainer import optim

PREFIX = "state/"
"""Before the names of the script's tensors: what else is kept has names of its own."""
VALUES = "values"
VALUES_BYTES = 256 * 1024
"""Room for all values as JSON: a snapshot keeps its layout from step to step, whatever they are."""
_LENGTH = struct.Struct("<Q")
PAIRS = "__pairs__"
"""The only key of what stands for a mapping with other keys than strings: its keys and values."""


def train_state(state: Mapping[str, Any], step: int) -> TrainState:
    """What storage keeps of `state`: references to its tensors, its values, and this rank's random state.

    Raises:
        ValueError: two leaves have one name, a leaf is neither tensor nor JSON, or the values do not fit their room.
    """
    tensors, values = _parts(state)
    own = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    return TrainState(
        step=step,
        tensors={name: tensor for name, tensor in tensors.items() if name not in own},
        per_rank={**own, VALUES: _packed(values), **optim.random_state()},
    )


def to_restore(state: Mapping[str, Any]) -> TrainState:
    """What storage is to fill. Optimizers that have made no step are given the tensors that one would have made, for
    all their parameters; of which parameters there were any when it was kept, is found when it is restored.

    Raises:
        ValueError: see `train_state`.
    """
    begun = {path: optimizer for path, optimizer in _optimizers("", state) if not optimizer.state}
    for optimizer in begun.values():
        _init_optim_state(optimizer)
    asked = train_state(state, step=0)
    moments = tuple(f"{PREFIX}{path}/state/" for path in begun)
    names = (*asked.tensors, *asked.per_rank)
    return replace(asked, optional=frozenset(name for name in names if name.startswith(moments)))


def take_over(state: MutableMapping[str, Any], restored: TrainState) -> None:
    """After storage has filled `restored`, which is `to_restore` of `state`: put all that it holds in place.

    Raises:
        ManifestError: the values are damaged.
        StateMismatch: they are of another state.
    """
    values = _unpacked(restored.per_rank[VALUES])
    tensors = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in (*restored.tensors.items(), *restored.per_rank.items())
        if name.startswith(PREFIX)
    }
    _filled(state, "", tensors, values)
    optim.set_random_state(restored.per_rank)


def _parts(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by name, and of the rest each largest piece without tensors by its path."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}

    def walk(path: str, node: Any) -> None:
        node = node.state_dict() if _is_stateful(node) else node
        if path in values or PREFIX + path in tensors:
            raise ValueError(f"state: two entries have the name {path!r}; give keys without /")
        if isinstance(node, Tensor):
            tensors[PREFIX + path] = node
        elif _holds_tensors(node):
            for key, child in _children(node):
                walk(f"{path}/{key}" if path else str(key), child)
        else:
            values[path] = node

    for key, node in state.items():
        walk(str(key), node)
    return tensors, values


def _optimizers(path: str, node: Any) -> Iterator[tuple[str, Optimizer]]:
    """Those below a node, by the path under which their state is kept."""
    for key, child in _children(node):
        below = f"{path}/{key}" if path else str(key)
        if isinstance(child, Optimizer):
            yield below, child
        elif not _is_stateful(child):
            yield from _optimizers(below, child)


def _is_stateful(node: Any) -> bool:
    return hasattr(node, "state_dict") and hasattr(node, "load_state_dict")


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, Mapping):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, (list, tuple)) else []


def _holds_tensors(node: Any) -> bool:
    """Whether there are tensors, or objects that may have some, below a node."""
    return any(
        isinstance(child, Tensor) or _is_stateful(child) or _holds_tensors(child) for _, child in _children(node)
    )


def _filled(node: Any, path: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Any:
    """A node whose content is what was kept; in place where that can be."""
    if isinstance(node, Tensor):
        if path not in tensors:
            raise _not_kept(path)
        return tensors[path]  # a `state_dict` may give another tensor each time that it is asked
    if _is_stateful(node):
        content = node.state_dict()
        if isinstance(node, Optimizer) and "state" in content:
            content["state"] = {
                key: entry
                for key, entry in content["state"].items()
                if _is_whole(entry, f"{path}/state/{key}", tensors)
            }
        node.load_state_dict(_filled(content, path, tensors, values))
        return node
    if path and not _holds_tensors(node):
        # An empty piece may have been none when it was kept, as an optimizer without parameters.
        if path not in values:
            raise _not_kept(path)
        return _like(node, values[path])
    filled = [
        (key, _filled(child, f"{path}/{key}" if path else str(key), tensors, values)) for key, child in _children(node)
    ]
    if isinstance(node, (MutableMapping, MutableSequence)):
        for key, child in filled:
            node[key] = child
        return node
    return _rebuilt(node, [child for _, child in filled])


def _not_kept(path: str) -> StateMismatch:
    return StateMismatch(f"state: {path} was not kept; restore with the state that is given to snapshot")


def _is_whole(node: Any, path: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether all tensors below a node were kept."""
    if isinstance(node, Tensor):
        return path in tensors
    return all(_is_whole(child, f"{path}/{key}", tensors) for key, child in _children(node))


def _rebuilt(template: tuple[Any, ...], items: list[Any]) -> Any:
    try:
        return template._make(items) if hasattr(template, "_make") else type(template)(items)
    except TypeError as error:
        raise StateMismatch(f"state: a {type(template).__name__} was kept with {len(items)} items: {error}") from error


def _like(template: Any, value: Any) -> Any:
    """A value as JSON gives it, with the tuples and kinds of mappings of the one that is there now."""
    if isinstance(value, dict):
        there = template if isinstance(template, Mapping) else {}
        keys = {str(key): key for key in there}
        pairs = value[PAIRS] if value.keys() == {PAIRS} else [[keys.get(k, k), v] for k, v in value.items()]
        content = {key: _like(there.get(key), child) for key, child in pairs}
        if type(template) is dict or not isinstance(template, MutableMapping):
            return content
        filled = copy.copy(template)
        filled.clear()
        filled.update(content)
        return filled
    if isinstance(value, list):
        like = template[0] if isinstance(template, (list, tuple)) and template else None
        known = len(template) if isinstance(template, (list, tuple)) else 0
        items = [_like(template[n] if n < known else like, item) for n, item in enumerate(value)]
        return _rebuilt(template, items) if isinstance(template, tuple) else items
    return value


def _plain(value: Any) -> Any:
    """A value in whose JSON no key is lost: JSON knows strings alone."""
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and value.keys() != {PAIRS}:
            return {key: _plain(child) for key, child in value.items()}
        wrong = next((key for key in value if not isinstance(key, (str, int, float, bool, type(None)))), None)
        if wrong is not None:
            raise TypeError(f"keys must be str, int, float, bool or None, not {type(wrong).__name__}")
        return {PAIRS: [[key, _plain(child)] for key, child in value.items()]}
    return [_plain(child) for child in value] if isinstance(value, (list, tuple)) else value


def _packed(values: Mapping[str, Any]) -> Tensor:
    try:
        values = {path: _plain(value) for path, value in values.items()}
        raw = json.dumps(values, separators=(",", ":")).encode()
    except (TypeError, ValueError):
        for path, value in values.items():
            try:
                json.dumps(_plain(value))
            except (TypeError, ValueError) as error:
                raise ValueError(f"state: {path} is neither a tensor nor JSON: {error}") from error
        raise
    if _LENGTH.size + len(raw) > VALUES_BYTES:
        largest = max(values, key=lambda path: len(json.dumps(values[path])))
        raise ValueError(
            f"state: its values take {len(raw)} bytes as JSON, {VALUES_BYTES - _LENGTH.size} are the most; the largest "
            f"is {largest}, keep it as a tensor"
        )
    packed = torch.zeros(VALUES_BYTES, dtype=torch.uint8)
    content = _LENGTH.pack(len(raw)) + raw
    packed[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return packed


def _unpacked(packed: Tensor) -> dict[str, Any]:
    content = packed.numpy().tobytes()
    (length,) = _LENGTH.unpack_from(content)
    try:
        values: dict[str, Any] = json.loads(content[_LENGTH.size : _LENGTH.size + length])
    except ValueError as error:
        raise ManifestError(f"the values of the state are damaged: {error}") from error
    return values
