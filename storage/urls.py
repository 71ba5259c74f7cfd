"""Named byte strings under an fsspec URL: created exclusively, read, listed, removed. No torch.

Local paths and ``file://`` get what a power cut demands: fsync of the file and of its folder. Other stores get one
request per record, because a conditional multipart upload is not conditional everywhere (Ceph RGW ignores the
condition). Records are never opened for writing through fsspec: its write streams commit a truncated object when an
exception passes through them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage import faults, s3
from storage.manifest import ManifestError, StateMismatch

# A record is sent as one PUT: s3fs turns to multipart at 100 MiB. The largest, a commit of 16,384 ranks, has 5 MB.
MAX_RECORD_BYTES = 64 * 1024 * 1024

# Tries of an exclusive create that neither succeeded nor left a record: S3 answers 409 when conditional writes race and
# asks for a retry. Waits of 0.1, 0.2, 0.4 and 0.8 s lie between them.
CREATE_TRIES = 5
CREATE_RETRY_S = 0.1
SCRATCH_TRIES = 100


SINGLE_WRITER = "single-writer::"
"""Before a URL whose store cannot create a record exclusively: its user vouches for one controller at a time.

Records are then created by looking first. The store still has to show what was written to whoever reads it next.
"""


_OR_ALONE = (
    f"; or, if never more than one controller writes there, put {SINGLE_WRITER} before the URL "
    "(docs/checkpoints.md, Stores)"
)


class StoreError(RuntimeError):
    """A URL cannot serve as a run directory, or a store did not answer in the allowed number of tries."""


@dataclass(frozen=True)
class Store:
    """An fsspec file system and the path in it that a URL names."""

    url: str
    fs: fsspec.AbstractFileSystem
    root: str
    local: bool
    single_writer: bool = False
    """Whether records are created by looking first: see SINGLE_WRITER."""

    def path(self, name: str) -> str:
        """The file system's path of `name`, which is relative to the URL.

        Raises:
            ValueError: `name` is absolute or leads out of the URL.
        """
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name:
            raise ValueError(f"name {name!r} must be a relative path below {self.url}")
        return f"{self.root.rstrip('/')}/{'/'.join(parts)}"

    def read(self, name: str) -> bytes:
        """The content of `name`. Raises FileNotFoundError when there is no such file."""
        path = self.path(name)
        return s3.read_all(self.fs, path) if s3.is_s3(self.fs) else bytes(self.fs.cat_file(path))


def locate(url: str) -> Store:
    """The store behind `url` (any fsspec URL, or a plain local path), with listing caches off.

    Raises:
        ConnectionRefusedError: chaos has it refuse for now.
    """
    faults.check_store(url)
    bare = url.removeprefix(SINGLE_WRITER)
    fs, root = fsspec.core.url_to_fs(bare, use_listings_cache=False)
    return Store(url=url, fs=fs, root=root, local=isinstance(fs, LocalFileSystem), single_writer=bare != url)


def check_protocol(url: str) -> None:
    """Raises StoreError when there is no file system for a URL."""
    bare = url.removeprefix(SINGLE_WRITER)
    protocol = fsspec.core.split_protocol(bare)[0] or "file"
    if protocol not in fsspec.available_protocols():
        raise StoreError(f"no file system for {protocol}://; use a path, s3:// or the like")
    if bare != url and "://" not in bare:
        raise StoreError(f"{SINGLE_WRITER} stands before a URL, such as {SINGLE_WRITER}file:///mnt/run")


def write_exclusive(url: str, name: str, data: bytes) -> bool:
    """Create the record `name` with exactly `data`, complete or not at all.

    Returns:
        True when the record now holds `data`, also when an equal record was there before: a request that is retried
        after a lost answer cannot be told from another writer's. Writers that race for one name put a nonce into the
        data. False when the record holds something else.

    Raises:
        StoreError: the store failed and holds no such record.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"record {name} has {len(data)} bytes, at most {MAX_RECORD_BYTES} fit one request")
    store = locate(url)
    path = store.path(name)
    if store.local:
        return _create_local(path, data, store.single_writer)
    failure: Exception | None = None
    for attempt in range(CREATE_TRIES):
        if attempt:
            time.sleep(CREATE_RETRY_S * 2 ** (attempt - 1))
        try:
            if not store.single_writer:
                store.fs.pipe_file(path, data, mode="create")
                return True
            if not store.fs.exists(path):
                store.fs.pipe_file(path, data)
        except (TypeError, NotImplementedError, PermissionError) as e:
            raise StoreError(f"{store.url}: cannot create {name}: {e!r}") from e
        except Exception as e:  # "exists" has no common type: on Ceph RGW it is OSError(22) with a 412 as its cause
            failure = e
        try:
            return store.read(name) == data
        except FileNotFoundError:
            continue
        except Exception as e:
            failure = e
    raise StoreError(f"{store.url}: cannot create {name} in {CREATE_TRIES} tries: {failure!r}") from failure


def _create_local(path: str, data: bytes, single_writer: bool) -> bool:
    # link() is both exclusive and complete; open("x") is exclusive, but a reader can see half of the content.
    folder, base = os.path.split(path)
    make_folder(folder)
    temporary = os.path.join(folder, f".{base}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        try:
            if not single_writer:
                os.link(temporary, path)
            elif os.path.exists(path):
                raise FileExistsError(path)
            else:
                os.rename(temporary, path)  # for file systems without links
        except FileExistsError:
            with open(path, "rb") as f:
                return f.read() == data
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
        sync_folder(folder)
    return True


def read_bytes(url: str, name: str) -> bytes:
    """The content of `name`.

    Raises:
        FileNotFoundError: there is no such record.
    """
    return locate(url).read(name)


def list_names(url: str, folder: str) -> list[str]:
    """Sorted names of the records directly in `folder` (relative to the URL); empty when there is no such folder."""
    return [name for name in _list(url, folder, "file") if not name.startswith(".")]


def list_folders(url: str, folder: str) -> list[str]:
    """Sorted names of the folders directly in `folder` (relative to the URL); empty when there is no such folder."""
    return _list(url, folder, "directory")


def _list(url: str, folder: str, kind: str) -> list[str]:
    store = locate(url)
    path = store.path(folder)
    try:
        entries: list[dict[str, Any]] = store.fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == kind)


def remove(url: str, name: str) -> None:
    """Remove the record `name`, or the folder of that name with all its content; nothing happens when it is gone."""
    store = locate(url)
    path = store.path(name)
    try:
        store.fs.rm(path, recursive=True)
    except FileNotFoundError:
        return
    if store.local:
        sync_folder(os.path.dirname(path))


def scratch_folder(url: str, rank: int) -> Path:
    """Where a rank of the run under `url` puts a part together before it is uploaded: one place, found again."""
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"shepherd-{os.getuid()}", key, f"rank-{rank:05d}")


def drop_scratch(folder: Path) -> None:
    """Remove a scratch folder, or what lies in one: a save that was killed could not do so itself."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in folder.parents:
        if parent == Path(tempfile.gettempdir()):
            break
        with contextlib.suppress(OSError):  # other saves, ranks and runs have theirs there
            parent.rmdir()


def make_scratch(folder: Path) -> None:
    """Make a new folder within a scratch folder. Raises OSError: there is no room, or one of that name."""
    for _ in range(SCRATCH_TRIES - 1):
        with contextlib.suppress(FileNotFoundError):  # another rank has just removed what they share, as it was empty
            return os.makedirs(folder, 0o700)
    os.makedirs(folder, 0o700)


def upload(store: Store, local_path: str, name: str) -> None:
    """Copy a finished local file to `name` in a remote store; large ones go in parallel parts."""
    assert not store.local
    store.fs.put_file(local_path, store.path(name))


def probe(url: str) -> None:
    """Check that `url` can be a run directory: writable, readable, and honouring exclusive creation (but where
    SINGLE_WRITER waives that, for writers at the same time).

    Raises:
        StoreError: it cannot; the message names the URL and what to do.
    """
    name = f".probe-{secrets.token_hex(8)}"
    try:
        store = locate(url)
        if not store.local and not store.single_writer and _checks_then_writes(store.fs):
            raise StoreError(f"{type(store.fs).__name__} cannot create a file exclusively")
        first, second = secrets.token_bytes(16), secrets.token_bytes(16)
        try:
            made = write_exclusive(url, name, first)
            made_again = write_exclusive(url, name, second)
            content = read_bytes(url, name)
        finally:
            remove(url, name)
    except Exception as e:
        raise StoreError(
            f"run.url {url!r} cannot hold a run: {e}. Fix: give run.url a folder or bucket that exists and that this "
            "user can write, on a file system with hard links or a store with conditional writes (S3, GCS, Azure)"
            f"{_OR_ALONE}"
        ) from e
    if not made or made_again or content != first:
        raise StoreError(
            f"run.url {url!r} does not honour exclusive creation: the same record was created twice. Two controllers "
            "could both commit. Fix: use a store with conditional writes (If-None-Match), or a local or NFS path"
            f"{_OR_ALONE}"
        )


def _checks_then_writes(fs: fsspec.AbstractFileSystem) -> bool:
    # fsspec's fallback for mode="create" asks whether the file exists and then writes: two writers can both win.
    own = getattr(type(fs), "_pipe_file", None) or type(fs).pipe_file
    return own is fsspec.AbstractFileSystem.pipe_file


@contextlib.contextmanager
def portable_errors() -> Iterator[None]:
    """Turn a store's own exception types into StoreError, which can be pickled between the ranks of a collective."""
    try:
        yield
    except (ManifestError, StateMismatch, StoreError, FileExistsError):
        raise
    except Exception as e:
        raise StoreError(f"{type(e).__name__}: {e}") from e


def make_folder(path: str) -> None:
    """Create a local folder and its parents so that they survive a power cut."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(os.path.abspath(path))
    make_folder(parent)
    os.makedirs(path, exist_ok=True)
    sync_folder(parent)


def sync_folder(path: str) -> None:
    """Flush a local folder's entries to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
