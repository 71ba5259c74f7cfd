"""S3 servers that the suites of stores run against. Each is started in its own folder and ports, and ended by its id.

`install.sh` beside this file installs those that are not in the project's environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
import s3fs
from s3_server import s3_bucket

INSTALLED = Path(__file__).parents[2] / "out" / "stores"
START_S = 120.0
END_S = 20.0
BUCKET = "bucket"


@contextmanager
def moto(folder: Path) -> Iterator[str]:
    with s3_bucket() as url:
        yield url


@contextmanager
def localstack(folder: Path) -> Iterator[str]:
    python = installed(INSTALLED / "localstack" / "bin" / "python")
    address = f"127.0.0.1:{free_port()}"
    environment = {
        "SERVICES": "s3",
        "EAGER_SERVICE_LOADING": "1",
        "GATEWAY_LISTEN": address,
        "DISABLE_EVENTS": "1",
        "SKIP_SSL_CERT_DOWNLOAD": "1",
        "S3_DIR": str(folder / "objects"),
        "LOCALSTACK_VOLUME_DIR": str(folder / "volume"),
        "FILESYSTEM_ROOT": str(folder / "root"),
    }
    with process([str(python), "-m", "localstack.runtime.main"], folder, environment) as alive:
        wait_until(lambda: answers(f"http://{address}/_localstack/health"), alive)
        with client_of(f"http://{address}", "test", "test"):
            yield f"s3://{BUCKET}"


@contextmanager
def ceph_rgw(folder: Path) -> Iterator[str]:
    """One monitor, one OSD on a memstore, and the gateway; no cephx between them, S3's signatures before them."""
    tools = {name: installed(shutil.which(name)) for name in ("ceph-mon", "ceph-osd", "radosgw", "monmaptool", "ceph")}
    admin = installed(shutil.which("radosgw-admin"))
    mon, rgw, fsid = f"127.0.0.1:{free_port()}", free_port(), "5c1e4b2e-0000-4000-8000-000000000001"
    conf = folder / "ceph.conf"
    conf.write_text(CEPH_CONF.format(folder=folder, mon=mon, rgw=rgw, fsid=fsid))
    for name in ("mon", "osd", "run"):
        (folder / name).mkdir()

    def call(*command: object) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=START_S, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout} {done.stderr}"
        return done.stdout

    call(tools["monmaptool"], "--create", "--clobber", "--fsid", fsid, "--addv", "a", f"[v2:{mon}]", "monmap")
    call(tools["ceph-mon"], "-c", conf, "--mkfs", "-i", "a", "--monmap", "monmap")
    with contextlib.ExitStack() as stack:
        alive = stack.enter_context(process([tools["ceph-mon"], "-c", conf, "-i", "a", "-f"], folder))
        wait_until(lambda: call(tools["ceph"], "-c", conf, "--connect-timeout", "5", "status"), alive)
        call(tools["ceph"], "-c", conf, "osd", "new", "5c1e4b2e-0000-4000-8000-000000000002")
        call(tools["ceph-osd"], "-c", conf, "-i", "0", "--mkfs", "--osd-uuid", "5c1e4b2e-0000-4000-8000-000000000002")
        stack.enter_context(process([tools["ceph-osd"], "-c", conf, "-i", "0", "-f"], folder))
        alive = stack.enter_context(process([tools["radosgw"], "-c", conf, "-n", "client.rgw", "-f"], folder))
        wait_until(lambda: answers(f"http://127.0.0.1:{rgw}/"), alive)
        made = json.loads(
            call(admin, "-c", conf, "-n", "client.rgw", "user", "create", "--uid", "u", "--display-name", "u")
        )
        key = made["keys"][0]
        with client_of(f"http://127.0.0.1:{rgw}", key["access_key"], key["secret_key"]):
            yield f"s3://{BUCKET}"


CEPH_CONF = """
[global]
fsid = {fsid}
mon host = [v2:{mon}]
auth cluster required = none
auth service required = none
auth client required = none
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
pid file =
log file = {folder}/$name.log
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail crit = 1
osd crush chooseleaf type = 0
public addr = 127.0.0.1
cluster addr = 127.0.0.1
[client.rgw]
# The gateway would insist on encryption, which there is none without cephx.
ms mon client mode = crc
rgw frontends = beast endpoint=127.0.0.1:{rgw}
rgw data = {folder}/rgw
rgw enable usage log = false
"""


@contextmanager
def rclone(folder: Path) -> Iterator[str]:
    """It serves plain files, and ignores conditions."""
    binary = installed(INSTALLED / "rclone" / "bin" / "rclone")
    address, secret = f"127.0.0.1:{free_port()}", secrets.token_hex(16)
    command = [str(binary), "serve", "s3", "--addr", address, "--auth-key", f"user,{secret}", str(folder)]
    with process(command, folder, {"RCLONE_CONFIG": str(folder / "none.conf")}) as alive:
        wait_until(lambda: answers(f"http://{address}/"), alive)
        with client_of(f"http://{address}", "user", secret):
            yield f"s3://{BUCKET}"


@contextmanager
def client_of(endpoint: str, key: str, secret: str) -> Iterator[None]:
    """The environment leads every S3 client to the server, with a bucket made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.Session().client("s3").create_bucket(Bucket=BUCKET)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield
        finally:
            s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def process(
    command: Sequence[str | Path], folder: Path, environment: dict[str, str] | None = None
) -> Iterator[Callable[[], None]]:
    """A server that is ended with the block; what is yielded raises when it has ended by itself."""
    log = folder / f"{Path(command[0]).name}.out"
    with open(log, "wb") as out:
        server = subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )

    def alive() -> None:
        assert server.poll() is None, f"{command[0]} has ended: {log.read_text(errors='replace')[-2000:]}"

    try:
        yield alive
    finally:
        server.terminate()
        try:
            server.wait(END_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(END_S)


def wait_until(condition: Callable[[], object], alive: Callable[[], None]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        alive()
        error: Exception | None = None
        try:
            if condition():
                return
        except AssertionError as e:
            error = e
        assert time.monotonic() < deadline, f"the server does not answer in {START_S} s: {error}"
        time.sleep(0.2)


def answers(url: str) -> bool:
    """Whether there is an answer, of whatever kind."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def installed(path: str | Path | None) -> Path:
    if path is None or not Path(path).exists():
        raise RuntimeError(f"{path or 'Ceph'} is not there: run tests/storage/install.sh (make test-long does)")
    return Path(path)
