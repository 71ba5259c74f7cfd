"""Chaos in a script of the user's: what can be done to any Python process, and what only to Shepherd's trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cluster
from herd import train
from test_script import bits, example

from orchestrator.chaos import command
from orchestrator.chaos.orders import Order
from orchestrator.chaos.scorecard import score
from orchestrator.observe.status import Status
from orchestrator.runtime import driver, journal

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
ORDERS = (
    Order(scenario="worker-segfault", rank=0),
    Order(scenario="memory", rank=1),
    Order(scenario="worker-exception", rank=0),
)
APART_STEPS = 9


def test_faults_of_a_process_are_done_to_a_script_and_change_nothing(cluster: Cluster, tmp_path: Path) -> None:
    calm = example(tmp_path, "calm-chaos", 0)
    assert train(calm)[0].exit_code == 0
    hurt = example(tmp_path, "hurt-chaos", 0.3)
    given: list[str] = []

    def give(order: Order) -> None:
        token = driver.read_token(hurt.cluster.log_dir, "hurt-chaos")
        command.give(driver.find("hurt-chaos"), token, order, by="test")

    def chaos(status: Status) -> None:
        due = len(given) < len(ORDERS) and status.step >= APART_STEPS * (len(given) + 1)
        if due and status.job == "training":
            with pytest.raises(driver.RunError, match="flip is for the Llama trainer"):
                give(Order(scenario="flip"))
            give(ORDERS[len(given)])
            given.append(ORDERS[len(given)].scenario)

    status, told = train(hurt, chaos)
    assert status.exit_code == 0, told
    scores = score(journal.read(hurt.run.url))
    assert [s.fault for s in scores] == given == [order.scenario for order in ORDERS]
    assert all(s.passed for s in scores), scores
    assert bits(hurt) == bits(calm)
