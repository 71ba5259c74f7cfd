"""What plain clients get of an S3 server, for checkpoint_speed.py; and moto's, in a process of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import fsspec
from boto3.s3.transfer import TransferConfig
from moto.server import ThreadedMotoServer

from checkpoints.rank import Rank, Timed, host_views

PART_BYTES = 16 << 20
"""Of an upload's parts and of ranged reads."""
IN_PARALLEL = 10
"""What boto3 does without being told."""


def serve(rank: Rank) -> str:
    """An S3 server of this process (moto's); its endpoint."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of each request
    server = rank.kept["s3"] = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    return "http://{}:{}".format(*server.get_host_and_port())


def make_bucket(rank: Rank, url: str) -> None:
    """Where there is none yet."""
    bucket, _ = _object(rank, url)
    if rank.rank == 0 and not _s3fs().exists(bucket):
        _boto3().create_bucket(Bucket=bucket)


def remove(rank: Rank, urls: list[str]) -> None:
    if rank.rank == 0:
        for url in urls:
            _s3fs().rm(url, recursive=True)


def write(rank: Rank, client: str, url: str) -> Timed:
    """Upload this rank's bytes by a plain client: ``boto3``, or ``s3fs`` from a file or from memory."""
    path, raw = _shard(rank)
    bucket, key = _object(rank, url)
    clients: dict[str, Callable[[], object]] = {
        "boto3 upload_file": lambda: _boto3().upload_file(path, bucket, key, Config=_parallel()),
        "s3fs put_file": lambda: _s3fs().put_file(path, f"{bucket}/{key}"),
        "s3fs pipe_file": lambda: _s3fs().pipe_file(f"{bucket}/{key}", raw),
    }
    return rank.timed(clients[client])


def read(rank: Rank, client: str, url: str) -> Timed:
    """Download what `write` has uploaded: into a file, or into memory by ranges in parallel."""
    path, raw = _shard(rank)
    bucket, key = _object(rank, url)
    starts = range(0, len(raw), PART_BYTES)
    ends = [min(start + PART_BYTES, len(raw)) for start in starts]
    clients: dict[str, Callable[[], object]] = {
        "boto3 download_file": lambda: _boto3().download_file(bucket, key, path + ".read", Config=_parallel()),
        "s3fs get_file": lambda: _s3fs().get_file(f"{bucket}/{key}", path + ".read"),
        "s3fs cat_ranges": lambda: _s3fs().cat_ranges([f"{bucket}/{key}"] * len(ends), list(starts), ends),
    }
    return rank.timed(clients[client])


def _shard(rank: Rank) -> tuple[str, bytes]:
    """A file with this rank's bytes, in the system's folder for temporary ones, and the bytes."""
    if "shard" not in rank.kept:
        raw = b"".join(view.tobytes() for view in host_views(rank))
        path = Path(os.environ["TMPDIR"], f"shard-{rank.rank}")
        path.write_bytes(raw)
        rank.kept["shard"] = str(path), raw
    shard: tuple[str, bytes] = rank.kept["shard"]
    return shard


def _object(rank: Rank, url: str) -> tuple[str, str]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return bucket, f"{prefix}/shard-{rank.rank}".lstrip("/")


def _boto3() -> Any:
    return boto3.client("s3")


def _parallel() -> TransferConfig:
    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=IN_PARALLEL)


def _s3fs() -> fsspec.AbstractFileSystem:
    return fsspec.filesystem("s3", use_listings_cache=False)
