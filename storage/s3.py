"""S3: multipart uploads from memory, what is left of those that were cut off, and reads into memory. No torch.

Through s3fs's `call_s3`, its door to single requests. Nothing stands under the final name before all parts are there;
fsspec's streams would leave a truncated object, and its `put_file` wants a file on a disk. Its `cat_file` asks for an
object's size first, and gathers what comes before it is copied to where it belongs.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import fsspec
from fsspec.asyn import sync

from storage.threads import in_threads

# A store answers a part of 16 MiB in about a second on one connection; ten at once fill a line of several Gb/s.
PART_BYTES = 16 * 1024 * 1024
CONCURRENCY = 10
MAX_PARTS = 10_000
"""S3's limit."""

STALE_UPLOAD_S = 86_400.0
"""From the start of an upload that nobody has ended to its removal: a save is given up after 600 s, and the clocks of
a store and of its clients differ by less than a day."""


def is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    return "s3" in fs.protocol and hasattr(fs, "call_s3")


def exists(fs: Any, path: str) -> bool:
    """Whether there is such an object, by one request; fsspec's own asks a second time, for a folder."""
    bucket, key, _ = fs.split_path(path)
    try:
        fs.call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return False
    return True


def upload(
    fs: Any,
    path: str,
    pieces: Sequence[tuple[int, memoryview]],
    size: int,
    go_on: Callable[[], None],
    check: Callable[[], None],
) -> None:
    """Create an object of `size` bytes from pieces and zeros: complete, or not at all.

    Args:
        pieces: each one's place in the object and content, in order.
        go_on: called before each request, from several threads; when it raises, there will be no object.
        check: called when all was sent; when it raises, there will be no object.
    """
    part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
    if size <= part_bytes:
        content = _gathered(pieces, 0, size)
        go_on()
        check()
        fs.pipe_file(path, content)
        return
    bucket, key, _ = fs.split_path(path)
    place = {"Bucket": bucket, "Key": key}
    place["UploadId"] = fs.call_s3("create_multipart_upload", **place)["UploadId"]

    def send(start: int) -> dict[str, Any]:
        go_on()
        content, number = _gathered(pieces, start, min(start + part_bytes, size)), start // part_bytes + 1
        answer = fs.call_s3("upload_part", **place, PartNumber=number, Body=content)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    try:
        parts = in_threads(send, range(0, size, part_bytes), CONCURRENCY)
        check()
        fs.call_s3("complete_multipart_upload", **place, MultipartUpload={"Parts": parts})
    except BaseException:
        with contextlib.suppress(Exception):  # what this leaves, `abort_stale_uploads` finds
            fs.call_s3("abort_multipart_upload", **place)
        raise
    fs.invalidate_cache(path)


def _gathered(pieces: Sequence[tuple[int, memoryview]], begin: int, end: int) -> bytes:
    """Bytes [begin, end) of the object, copied once: clients copy what is not bytes another time."""
    found: list[bytes | memoryview] = []
    done = begin
    for at, piece in pieces[max(0, bisect_right(pieces, begin, key=lambda entry: entry[0]) - 1) :]:
        if at >= end:
            break
        first, last = max(begin, at), min(end, at + len(piece))
        if first < last:
            found += [bytes(first - done), piece[first - at : last - at]]
            done = last
    return b"".join([*found, bytes(end - done)])


def read(fs: Any, path: str, start: int, into: memoryview) -> int:
    """Fill `into`, which is not empty, with an object's bytes from `start` on as they arrive; how many there were.

    Raises:
        FileNotFoundError: there is no such object.
        Exception: the store failed, the answer was cut off, or the object ends before `start`.
    """
    return int(sync(fs.loop, _read, fs, path, start, into))


async def _read(fs: Any, path: str, start: int, into: memoryview) -> int:
    done = 0
    with contextlib.closing(await _body(fs, path, Range=f"bytes={start}-{start + len(into) - 1}")) as body:
        while done < len(into) and (part := await body.read(len(into) - done)):
            into[done : done + len(part)] = part
            done += len(part)
    return done


def read_all(fs: Any, path: str) -> bytes:
    """An object's bytes, by one request. Raises as `read` does."""
    return bytes(sync(fs.loop, _read_all, fs, path))


async def _read_all(fs: Any, path: str) -> bytes:
    with contextlib.closing(await _body(fs, path)) as body:
        return bytes(await body.read())


async def _body(fs: Any, path: str, **options: str) -> Any:
    bucket, key, _ = fs.split_path(path)
    return (await fs._call_s3("get_object", Bucket=bucket, Key=key, **options))["Body"]


def abort_stale_uploads(fs: Any, path: str) -> list[str]:
    """End uploads under `path` that were begun so long ago: their parts are kept, and paid for. Their keys."""
    bucket, prefix, _ = fs.split_path(path)
    before = datetime.now(UTC) - timedelta(seconds=STALE_UPLOAD_S)
    aborted = []
    for entry in list(_uploads(fs, bucket, prefix)):
        if entry["Initiated"] < before:
            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=entry["Key"], UploadId=entry["UploadId"])
            aborted.append(entry["Key"])
    return aborted


def _uploads(fs: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    marker: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
        yield from page.get("Uploads", [])
        if not page.get("IsTruncated"):
            return
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
