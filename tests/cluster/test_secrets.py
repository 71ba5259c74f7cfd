"""What is secret stays so: nothing planted in environment and job, and no token, is in what a run leaves or shows."""

import json
import os
import secrets
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from herd import command, job, ray_started, spec_file, wait_for

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def session_dir() -> Iterator[Path]:
    """For Ray's own files; short, because sockets lie there."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def installed_store(folder: Path) -> None:
    """Make vault:// known to every process that has `folder` on its PYTHONPATH, as an installed package would."""
    info = folder / "vault_store-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vault-store\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fsspec.specs]\nvault = vault_store:Vault\n")


def test_no_planted_secret_gets_out(tmp_path: Path, session_dir: Path) -> None:
    planted = {name: f"planted{secrets.token_hex(12)}" for name in ("url", "corpus", "aws", "hf", "password", "ray")}
    installed_store(tmp_path / "site")
    faults = tmp_path / "faults"
    faults.mkdir()
    environment = {
        "AWS_SECRET_ACCESS_KEY": planted["aws"],
        "HF_TOKEN": planted["hf"],
        "DATABASE_PASSWORD": planted["password"],
        "RAY_AUTH_TOKEN": planted["ray"],
        "SHEPHERD_TEST_FAULTS": str(faults),
        "SHEPHERD_TEST_VAULT": str(tmp_path / "store-failed"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(tmp_path / "site"), os.environ["PYTHONPATH"]]),
    }
    run_dir = tmp_path / "run"
    document = job(
        "secretive",
        tmp_path,
        run={"url": f"vault://owner:{planted['url']}@host{run_dir}", "steps": 24},
        data={"corpus": f"vault://reader:{planted['corpus']}@host{tmp_path / 'corpus'}"},
        parallel={"dp_replicate": 1},
        checkpoint={"interval_steps": 4},
    )
    # Once, a store's careless words; slow steps, so that the metrics can be read meanwhile.
    looked_at = tmp_path / "looked-at"
    (faults / "secretive.py").write_text(
        f"import pathlib, time; seen = pathlib.Path({str(looked_at)!r})\n"
        "if session.state.step > 5 and not seen.exists(): time.sleep(5)\n"
        f"once = pathlib.Path({str(tmp_path / 'worker-failed')!r})\n"
        "if session.state.step == 5 and session.rank == 1 and not once.exists():\n"
        "    once.touch(); raise OSError(f'{session.config.url} is away')\n"
    )
    file = str(spec_file(document, tmp_path / "spec.toml"))
    shown: dict[str, str] = {}
    with ray_started(f"--temp-dir={session_dir}", "--include-dashboard=false", environment=environment) as address:
        environment["RAY_ADDRESS"] = address

        def shepherd(*arguments: str) -> str:
            with command(*arguments, **environment) as process:
                shown[" ".join(arguments)], _ = process.communicate(timeout=120)
            assert process.returncode == 0, shown[" ".join(arguments)]
            return shown[" ".join(arguments)]

        shepherd("doctor", file, "--json")
        with command("train", file, **environment) as training:
            wait_for((run_dir / "evidence").exists, 120, "the worker's failure")
            status = json.loads(wait_for(lambda: reached(environment, 6), 60, "step 6"))
            shown["status"] = json.dumps(status)
            with urllib.request.urlopen(f"http://{status['metrics_address']}/metrics", timeout=10) as page:
                shown["metrics"] = page.read().decode()
            controller = psutil.Process(status["controller_pid"]).environ()
            assert controller["AWS_SECRET_ACCESS_KEY"] == planted["aws"], "it is where it could be seen"
            token_file = tmp_path / "logs" / "secretive" / "token"
            planted["token"] = token_file.read_text()
            shepherd("chaos", "worker-kill", "--run", "secretive", "--log-dir", str(tmp_path / "logs"), "--json")
            looked_at.touch()
            shown["train"], _ = training.communicate(timeout=120)
        assert training.returncode == 0, shown["train"]
        with command("train", file, **environment) as again:
            shown["refusal"], _ = again.communicate(timeout=60)
        assert again.returncode == 2 and "--resume" in shown["refusal"]
        with command("train", file, "--resume", "--set", "run.seed=9", **environment) as other:
            shown["other seed"], _ = other.communicate(timeout=60)
        assert other.returncode == 2 and "run.seed" in shown["other seed"]
        shepherd("report", document["run"]["url"], "-o", str(tmp_path / "report.html"))

    # Both failures were told, without what is secret in them: else this test would look at nothing.
    assert "OSError: vault://***@host" in "".join(p.read_text() for p in (run_dir / "evidence").iterdir())
    journal = b"".join(p.read_bytes() for p in (run_dir / "journal").iterdir())
    assert b"vault://***@host" in journal and b"WorkerFailed" in journal
    assert "vault://***@host" in (run_dir / "run.json").read_text()

    leaks = [f"{what}: {name}" for what, text in shown.items() for name in found(planted, text.encode())]
    files = [run_dir, tmp_path / "logs", tmp_path / "ram", tmp_path.parent / "data-cache", session_dir]
    seen = 0
    for path in (p for folder in files for p in sorted(folder.rglob("*")) if p.is_file() and p != token_file):
        seen += 1
        leaks += [f"{path}: {name}" for name in found(planted, path.read_bytes())]
    leaks += [f"report: {name}" for name in found(planted, (tmp_path / "report.html").read_bytes())]
    assert leaks == []
    assert seen > 30


def reached(environment: dict[str, str], step: int) -> str:
    with command("status", "secretive", "--json", **environment) as process:
        out, _ = process.communicate(timeout=60)
    return out if process.returncode == 0 and json.loads(out)["step"] >= step else ""


def found(planted: dict[str, Any], content: bytes) -> list[str]:
    return [name for name, secret in planted.items() if secret.encode() in content]
