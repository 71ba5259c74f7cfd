"""Pins of checkpoints, on a disk and on an object store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import s3_bucket

from storage.pins import pin, pin_name, pinned, unpin, why_pinned
from storage.urls import locate


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["disk", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    if request.param == "memory":
        return f"memory://{tmp_path.name}"
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def test_a_pin_stays_until_it_is_taken_away(url):
    assert pinned(url) == set()
    assert pin(url, 120, "for the paper")
    assert pin(url, 100_000_000, "nine digits")
    assert pin(url, 120, "for the paper")
    assert not pin(url, 120, "a second reason")
    assert pin(url, 40, "")
    assert pinned(url) == {40, 120, 100_000_000}
    assert why_pinned(url, 120) == "for the paper"
    unpin(url, 120)
    unpin(url, 120)
    assert pinned(url) == {40, 100_000_000}
    with pytest.raises(FileNotFoundError):
        why_pinned(url, 120)


def test_a_damaged_pin_still_pins(url):
    pin(url, 7, "why")
    store = locate(url)
    store.fs.pipe_file(store.path(pin_name(7)), b"{")
    assert pinned(url) == {7}
    assert why_pinned(url, 7) == ""
