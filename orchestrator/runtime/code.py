"""The code that workers import, when it is not the installed one: packed under run.url, unpacked on each node.

A packet is a zip of the Python packages that a worker imports, as they were in a working directory, and is known by its
SHA-256: every node runs the same, also one that joins later, whatever becomes of that directory. What agents and
workers say to each other is the agents' code, so that part must be the same in the packet.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from storage.urls import read_bytes, write_exclusive

PACKAGES = ("trainer", "storage", "orchestrator")
SUFFIXES = (".py", ".toml")
PACKET_MAX_BYTES = 16 * 1024 * 1024
"""Unpacked. Shepherd's own packages are 1.3 MB; who comes near this has packed something else."""
SPOKEN = ("trainer/contract.py", "storage/manifest.py", "storage/ram.py", "orchestrator/runtime/zygote.py")
"""What both sides must have alike: messages, commits, the files of snapshots, and how a worker is forked."""
INSTALLED = Path(__file__).resolve().parent.parent.parent
_EPOCH = (1980, 1, 1, 0, 0, 0)


class CodeError(ValueError):
    """A working directory is not one that workers can be started from, or a packet is not what it should be."""


def pack(folder: Path) -> bytes:
    """The packet of a working directory; the same content gives the same bytes.

    Raises:
        CodeError: `trainer` is not in it, it is too large, or it speaks otherwise than the installed code.
    """
    if not (folder / "trainer" / "worker.py").is_file():
        raise CodeError(f"{folder}: trainer/worker.py is not in it, which workers are started from")
    for name in SPOKEN:
        there = folder / name
        if there.exists() and there.read_bytes() != (INSTALLED / name).read_bytes():
            raise CodeError(
                f"{folder}: {name} is not the installed one, by which agents and workers understand each other; stop "
                "the run, install the new version on every node, and resume it"
            )
    files = [
        path
        for package in PACKAGES
        for path in sorted((folder / package).rglob("*"))
        if path.is_file() and path.suffix in SUFFIXES and "__pycache__" not in path.parts
    ]
    size = sum(path.stat().st_size for path in files)
    if size > PACKET_MAX_BYTES:
        raise CodeError(f"{folder}: its packages have {size} bytes, at most {PACKET_MAX_BYTES} are taken")
    packet = io.BytesIO()
    with zipfile.ZipFile(packet, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.writestr(zipfile.ZipInfo(path.relative_to(folder).as_posix(), _EPOCH), path.read_bytes())
    return packet.getvalue()


def publish(url: str, packet: bytes) -> str:
    """Put a packet under the run directory; its name. Raises storage.urls.StoreError when the store fails."""
    code = hashlib.sha256(packet).hexdigest()
    write_exclusive(url, _name(code), packet)
    return code


def unpack(url: str, code: str, folder: Path) -> Path:
    """The unpacked packet `code` in this node's `folder`; made once.

    Raises:
        CodeError: what lies under run.url is another packet.
        FileNotFoundError, storage.urls.StoreError: it is not there, or the store failed.
    """
    there = folder / code
    if there.is_dir():
        return there
    packet = read_bytes(url, _name(code))
    if hashlib.sha256(packet).hexdigest() != code:
        raise CodeError(f"{_name(code)} under run.url is damaged: its SHA-256 is another")
    folder.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder))
    try:
        with zipfile.ZipFile(io.BytesIO(packet)) as archive:
            archive.extractall(new)  # keeps what it writes inside the folder
        os.rename(new, there)
    except OSError:
        if not there.is_dir():  # else another agent of this machine was faster
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return there


def _name(code: str) -> str:
    return f"code/{code}.zip"
