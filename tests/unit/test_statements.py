"""Statements and pins: what is said of checkpoints, and which of them somebody wants to keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage import statements
from storage.commits import delete_checkpoint
from storage.manifest import Certificate, ManifestError
from storage.statements import Statement

CERTIFICATE = Certificate(
    step=120,
    generation=3,
    checks=("at_rest", "replicas"),
    audits_passed=300,
    fault_rate_per_billion=10_000_000,
    confidence_per_million=950_000,
    epoch=2,
)
VERIFIED = Statement(step=120, generation=3, epoch=2, trust="verified", at_unix_s=1_000, by="n1", detail="1 B read")


def test_what_is_said_is_read_the_newest_last(tmp_path: Path) -> None:
    url = str(tmp_path)
    assert statements.read(url) == {}
    certified = replace(VERIFIED, trust="certified", at_unix_s=1_001, certificate=CERTIFICATE)
    other = replace(VERIFIED, step=40, generation=1, trust="damaged")
    for statement in (certified, VERIFIED, other):
        statements.write(url, statement)
    assert statements.read(url) == {40: (other,), 120: (VERIFIED, certified)}
    assert (tmp_path / "checkpoints/trust/step-00000120-g3-verified.json").is_file()


def test_what_was_said_last_is_not_said_again_and_what_was_taken_back_is(tmp_path: Path) -> None:
    url = str(tmp_path)
    damaged = replace(VERIFIED, trust="damaged", at_unix_s=1_005)
    later = replace(VERIFIED, at_unix_s=1_009)
    for statement in (VERIFIED, replace(VERIFIED, at_unix_s=1_002), damaged, later, later):
        statements.write(url, statement)
    assert statements.read(url) == {120: (VERIFIED, damaged, later)}


@pytest.mark.parametrize("at", range(0, 300, 7))
def test_a_flipped_bit_makes_it_no_statement(tmp_path: Path, at: int) -> None:
    statements.write(str(tmp_path), VERIFIED)
    (path,) = (tmp_path / "checkpoints/trust").iterdir()
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] ^= 1
    path.write_bytes(raw)
    try:
        held = Statement.from_json(bytes(raw))
    except ManifestError:
        assert statements.read(str(tmp_path)) == {}
    else:
        assert held == VERIFIED, "white space may change"


def test_a_moved_record_and_one_that_says_nonsense_say_nothing(tmp_path: Path) -> None:
    url = str(tmp_path)
    statements.write(url, VERIFIED)
    (path,) = (tmp_path / "checkpoints/trust").iterdir()
    path.rename(path.with_name("step-00000040-g3-verified.json"))
    path.with_name("step-00000040-g1-damaged.json").write_bytes(b"{}")
    nonsense: Any = "holy"
    path.with_name("step-00000050-g1-damaged.json").write_bytes(replace(VERIFIED, trust=nonsense).to_json())
    path.with_name("step-00000060-g1-holy.json").write_bytes(VERIFIED.to_json())
    assert statements.read(url) == {}


def test_with_a_checkpoint_goes_what_was_said_of_it(tmp_path: Path) -> None:
    url = str(tmp_path)
    other = replace(VERIFIED, step=40)
    for statement in (VERIFIED, other):
        statements.write(url, statement)
    delete_checkpoint(url, 120)
    assert statements.read(url) == {40: (other,)}
