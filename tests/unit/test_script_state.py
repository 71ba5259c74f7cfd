"""The state of a user's script: what is kept of it, and that it comes back in place."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from storage.manifest import ManifestError, StateMismatch
from trainer.script_state import VALUES, take_over, to_restore, train_state


def trained(steps: int, seed: int = 0) -> dict[str, Any]:
    """A state of a script that has made so many steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    for _ in range(steps):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "ema": {"decay": 0.99, "shadow": [torch.full((2,), float(steps)), torch.tensor(steps)]},
        "seen": {"samples": steps * 8, "best": (0.5, None), "names": {3: "three"}},
        "empty": {},
    }


def kept(state: dict[str, Any], step: int) -> Any:
    """As storage keeps it: with the bytes of now."""
    made = train_state(state, step)
    made.per_rank = {name: tensor.clone() for name, tensor in made.per_rank.items()}
    return made


def restored(state: dict[str, Any], source: Any) -> None:
    target = to_restore(state)
    part = target.without_missing({f"rank/00000/{name}" for name in source.per_rank}, 0)
    target.restored(part, source.step)
    assert target.per_rank.keys() == source.per_rank.keys()
    for name, tensor in target.per_rank.items():
        assert (tensor.shape, tensor.dtype) == (source.per_rank[name].shape, source.per_rank[name].dtype), name
        with torch.no_grad():
            tensor.copy_(source.per_rank[name])
    take_over(state, target)


def test_all_of_a_state_comes_back_in_place() -> None:
    source = trained(5)
    snapshot = kept(source, 5)
    drawn = torch.randn(3)
    target = trained(0, seed=1)
    model, ema = target["model"], target["ema"]
    weight = model[0].weight
    restored(target, snapshot)
    assert target["model"] is model and model[0].weight is weight and target["ema"] is ema, "in place"
    assert torch.equal(torch.randn(3), drawn), "the random state, too"
    for name, tensor in source["model"].state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    mine, its = target["optimizer"].state_dict(), source["optimizer"].state_dict()
    assert mine["param_groups"] == its["param_groups"]
    assert isinstance(mine["param_groups"][0]["betas"], tuple)
    for number, moments in its["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(mine["state"][number][name], tensor), (number, name)
    assert target["scheduler"].state_dict() == source["scheduler"].state_dict()
    assert (target["seen"], target["empty"], ema["decay"]) == (source["seen"], {}, 0.99)
    assert [tensor.tolist() for tensor in ema["shadow"]] == [[5.0, 5.0], 5]


class Best(NamedTuple):
    loss: float
    weight: torch.Tensor


class Place(NamedTuple):
    epoch: int
    shard: str


def test_containers_come_back_as_what_they_are() -> None:
    def state(step: int) -> dict[str, Any]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        return {
            "best": Best(0.5 * step, torch.full((2,), float(step))),
            "place": Place(step, "a"),
            "history": {n: {"loss": 0.1 * n} for n in range(step)},
            "seen": Counter({"a": step}),
            "order": OrderedDict([("b", step), ("a", 1)]),
            "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4]),
            "mixed": {None: 1, True: 2, 1.5: [3], "x": {"__pairs__": step}},
        }

    source, target = state(3), state(0)
    for _ in range(3):
        source["scheduler"].optimizer.step()
        source["scheduler"].step()
    restored(target, kept(source, 3))
    for name in ("place", "history", "seen", "order", "mixed"):
        assert target[name] == source[name] and type(target[name]) is type(source[name]), name
    assert (type(target["best"]), target["best"].loss, target["best"].weight.tolist()) == (Best, 1.5, [3.0, 3.0])
    milestones = target["scheduler"].milestones
    assert type(milestones) is Counter and milestones == Counter({2: 1, 4: 1})


def test_values_as_they_were_kept_before_pairs_come_back() -> None:
    """Number keys were strings then, and became numbers by what is there now."""
    source = kept({"names": {3: "three"}}, 1)
    raw = json.dumps({"names": {"3": "three"}}).encode()
    source.per_rank[VALUES][: 8 + len(raw)] = torch.frombuffer(
        bytearray(len(raw).to_bytes(8, "little") + raw), dtype=torch.uint8
    )
    target: dict[str, Any] = {"names": {3: "?"}}
    restored(target, source)
    assert target == {"names": {3: "three"}}


def test_a_restored_state_trains_on_as_the_one_that_was_kept() -> None:
    def go_on(state: dict[str, Any]) -> torch.Tensor:
        for _ in range(3):
            state["model"](torch.randn(8, 4)).square().sum().backward()
            state["optimizer"].step()
            state["optimizer"].zero_grad()
            state["scheduler"].step()
        return state["model"][0].weight.detach()

    source = trained(5)
    snapshot = kept(source, 5)
    expected = go_on(source).clone()
    target = trained(0, seed=1)
    restored(target, snapshot)
    assert torch.equal(go_on(target), expected)


def test_an_optimizer_that_is_begun_changes_nothing() -> None:
    state = trained(0)
    before = {name: tensor.clone() for name, tensor in state["model"].state_dict().items()}
    to_restore({"nested": state})
    assert len(state["optimizer"].state) == 4
    assert state["optimizer"].param_groups[0]["lr"] == 0.1
    assert all(torch.equal(before[name], tensor) for name, tensor in state["model"].state_dict().items())


class Sampler:
    """Tells its state in a tensor that is made when it is asked, as `generator.get_state()` is."""

    def __init__(self, position: int) -> None:
        self.position = position

    def state_dict(self) -> dict[str, Any]:
        return {"position": torch.tensor(self.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = int(state["position"])


def test_an_object_whose_state_is_made_when_it_is_asked_gets_what_was_kept() -> None:
    target = {"sampler": Sampler(0)}
    restored(target, kept({"sampler": Sampler(500)}, 1))
    assert target["sampler"].position == 500


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5),
    "plain sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "tensor lr": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.1)),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_moments_come_back_for_those_parameters_that_had_any(kind: str, steps: int) -> None:
    """Of three heads one is never used, and one from the next step on; the optimizers stand in a list."""

    def heads(steps: int) -> dict[str, Any]:
        torch.manual_seed(steps)
        used, later, never = (nn.Linear(2, 2) for _ in range(3))
        parameters = [*never.parameters(), *used.parameters(), *later.parameters()]
        state = {"heads": nn.ModuleList((used, later, never)), "optimizers": [OPTIMIZERS[kind](parameters)]}
        for _ in range(steps):
            go_on(state, used)
        return state

    def go_on(state: dict[str, Any], *heads: nn.Module) -> None:
        for head in heads:
            head(torch.ones(1, 2)).square().sum().backward()
        state["optimizers"][0].step()
        state["optimizers"][0].zero_grad()

    source = heads(steps)
    snapshot = kept(source, steps)
    target = heads(0)
    restored(target, snapshot)
    its, mine = source["optimizers"][0].state_dict(), target["optimizers"][0].state_dict()
    assert its["state"].keys() == mine["state"].keys()
    assert its["param_groups"] == mine["param_groups"]
    for state in (source, target):
        go_on(state, *state["heads"][:2])
    for one, other in zip(source["heads"].parameters(), target["heads"].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": {"b": object()}}, "a is neither a tensor nor JSON"),
        ({"a": {"t": torch.ones(1), "b": {1, 2}}}, "a/b is neither a tensor nor JSON"),
        ({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}, "two entries have the name 'a/b'"),
        ({"short": 1, "long": "x" * 300_000}, "the largest is long"),
    ],
)
def test_what_cannot_be_kept_is_named(state: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train_state(state, 1)


def test_values_of_another_state_are_refused() -> None:
    snapshot = kept({"t": torch.ones(1), "epoch": 3}, 1)
    with pytest.raises(StateMismatch, match="samples was not kept"):
        restored({"t": torch.ones(1), "samples": 0}, snapshot)


def test_damaged_values_are_refused() -> None:
    snapshot = kept({"epoch": 3}, 1)
    snapshot.per_rank[VALUES][8] = 0
    with pytest.raises(ManifestError, match="damaged"):
        restored({"epoch": 0}, snapshot)


def test_the_layout_does_not_depend_on_the_values() -> None:
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in train_state({"history": [0.1] * n}, n).per_rank.items()}
        for n in (1, 1000)
    ]
    assert shapes[0] == shapes[1]


class Counting(torch.optim.SGD):
    """Whose state holds no tensors."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["steps"] = self.state[parameter].get("steps", 0) + 1


def test_an_optimizers_state_without_tensors_comes_back() -> None:
    def state(steps: int) -> dict[str, Any]:
        made = {"optimizer": Counting(nn.Linear(2, 2).parameters(), lr=torch.tensor(0.1))}
        for _ in range(steps):
            made["optimizer"].step()
        return made

    target = state(0)
    restored(target, kept(state(5), 5))
    assert [entry["steps"] for entry in target["optimizer"].state.values()] == [5, 5]


def test_on_other_numbers_of_ranks_what_belongs_to_a_rank_is_left_alone() -> None:
    target = to_restore(trained(0))
    assert target.optional and target.without_missing(set(), None).per_rank.keys() == target.per_rank.keys()
