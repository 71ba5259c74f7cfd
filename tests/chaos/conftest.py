"""The cluster of this folder's tests, gone before that of others starts: a process has one at a time."""

from collections.abc import Iterator

import pytest
from rig import Rig, rig


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("chaos")) as made:
        yield made
