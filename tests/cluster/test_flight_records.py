"""Scripts whose ranks disagree about the next collective: only the flight records tell who has left which one out.

On a GPU they also tell who waits at all.
"""

import json
import re
from pathlib import Path

import pytest
from conftest import Cluster
from herd import DEVICE, train

from orchestrator.scripts import spec_of_command
from orchestrator.spec import JobSpec

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

# Four ranks on two nodes. Each step is a sum over a pair and one over all; one rank, once, does otherwise.
SCRIPT = """
import os, pathlib, sys, time, torch
import torch.distributed as dist
import shepherd
session = shepherd.session()
device = "DEVICE"
if device == "cuda":  # all on the first GPU, which NCCL refuses unless they seem to be on different machines
    os.environ |= {"NCCL_HOSTID": str(os.getpid()), "NCCL_SOCKET_IFNAME": "lo"}
    torch.cuda.set_device(0)
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank = dist.get_rank()
pairs = [dist.new_group(ranks, group_desc="pair") for ranks in ([0, 1], [2, 3])]
mark = pathlib.Path(sys.argv[1], "done")
for step in range(1, 31):
    odd = rank == 2 and step == 10 and not mark.exists()
    if odd:
        mark.touch()
    ours, all_ours = torch.ones(4, device=device), torch.ones(8, device=device)
    dist.all_reduce(ours, group=pairs[rank // 2])
    time.sleep(0.1)
    SUM
    session.step(step, loss=float(ours.sum() + all_ours.sum()))
dist.destroy_process_group()
"""
SUMS = {
    "another": "dist.barrier() if odd else dist.all_reduce(all_ours)",
    "none": "odd or dist.all_reduce(all_ours)",
    "late": "while odd: time.sleep(0.01)\n    dist.all_reduce(all_ours)",
}
# NCCL does not compare what ranks bring; and it begins what comes later, so that counts do not show what was left out.
KINDS = [kind for kind in SUMS if DEVICE == "cpu" or kind == "late"]
SUM = rf"all_reduce of 8 elements, number 10 of group default_pg \({'nccl' if DEVICE == 'cuda' else 'gloo'} 0\)"
SAYS = {
    "another": rf"; it waits in barrier where 3 others wait in {SUM}",
    "none": rf"; it has not begun {SUM}, in which 3 ",
    "late": rf"; it has not begun {SUM}, in which 3 ",
}
BEGINS = {"late": "rank 2 does not wait for anybody while 3 others do"}


def job(folder: Path, name: str) -> JobSpec:
    (folder / f"{name}.py").write_text(SCRIPT.replace("SUM", SUMS[name]).replace("DEVICE", DEVICE))
    values = {"run.url": folder / name, "cluster.log_dir": folder / "logs", "cluster.ram_dir": folder / "ram"}
    values |= {
        "cluster.device": DEVICE,
        "recovery.rank_silence_s": 30,
        "recovery.stall_floor_s": 5,
        "recovery.node_silence_s": 60,
    }
    overrides = [f"{key}={value}" for key, value in values.items()]
    words = ["python", str(folder / f"{name}.py"), str(folder)]
    return spec_of_command(words, overrides=overrides, name=name, nodes=2, procs_per_node=2)


@pytest.mark.parametrize("kind", KINDS)
def test_who_has_not_begun_what_the_others_wait_in_is_named(cluster: Cluster, tmp_path: Path, kind: str) -> None:
    spec = job(tmp_path, kind)
    status, told = train(spec)
    assert status.exit_code == 0, told
    (incident,) = status.incidents
    print(incident.detail)
    assert (incident.cause, incident.culprit) == ("hang", status.mesh[1]), incident.detail
    assert incident.detail.startswith(BEGINS.get(kind, "rank 2 is out of step with 3 others"))
    assert re.search(SAYS[kind], incident.detail), incident.detail
    files = re.search(
        r" and flight records in (evidence/g1-r2-flight\.json), (evidence/g1-r0-flight\.json)$", incident.detail
    )
    assert files is not None, incident.detail
    odd, other = (json.loads(Path(spec.run.url, name).read_text()) for name in files.groups())
    assert [(told["rank"], told["generation"]) for told in (odd, other)] == [(2, 1), (0, 1)]
    waits = [entry for entry in other["entries"] if not entry["retired"]]
    transport = "nccl" if DEVICE == "cuda" else "gloo"
    assert [(e["profiling_name"], e["collective_seq_id"]) for e in waits] == [(f"{transport}:all_reduce", 10)]
