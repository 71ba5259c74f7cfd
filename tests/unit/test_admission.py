"""Known products: a device that gets one element wrong, or not always the same, is found, and keeps its node out."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import torch

from orchestrator.runtime.preparation import NotAdmitted, check_devices
from orchestrator.spec import JobSpec, parse
from trainer import admission

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "SECONDS", 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_a_device_that_is_right_passes(seed: int) -> None:
    told = admission.check_device(CPU, seed)
    assert told["problem"] == "" and told["tflops"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_one_wrong_element_is_found(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        wrong = a @ b
        wrong.view(-1)[seed * 100_003 % wrong.numel()] += 1
        return wrong

    monkeypatch.setattr(admission, "product", product)
    assert admission.check_device(CPU, seed)["problem"] == "1 of 512 rows of a product of whole numbers are wrong"


def test_a_product_that_differs_now_and_then_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        made.append(1)
        return a @ b + (len(made) == 3)

    monkeypatch.setattr(admission, "product", product)
    assert admission.check_device(CPU, 0)["problem"] == "product 3 of the same matrices differs from the first"


def test_every_sum_is_exact_in_float32() -> None:
    assert max(admission.SIZE.values()) * admission.LARGEST**2 <= 2**24


def job(tmp_path: Path, **cluster: str) -> JobSpec:
    return parse({"run": {"name": "r", "url": str(tmp_path)}, "cluster": cluster})


@pytest.mark.parametrize("wrong", [False, True])
def test_a_node_checks_its_devices_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    if wrong:  # what Python runs when it starts
        (tmp_path / "sitecustomize.py").write_text(
            "import torch; right = torch.Tensor.__matmul__\n"
            "torch.Tensor.__matmul__ = lambda a, b: right(a, b) * (2 if a.is_floating_point() else 1)\n"
        )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    checking = check_devices(job(tmp_path, admission="on"), "a")
    if wrong:
        with pytest.raises(NotAdmitted, match="a computes what is wrong: cpu: 512 of 512 rows"):
            asyncio.run(checking)
    else:
        asyncio.run(checking)


@pytest.mark.parametrize(
    ("admission", "device", "checks"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("on", "cpu", True), ("off", "cuda", False)],
)
def test_it_is_for_cuda_unless_the_job_says_otherwise(
    tmp_path: Path, admission: str, device: str, checks: bool
) -> None:
    assert job(tmp_path, admission=admission, device=device).checks_admission is checks
