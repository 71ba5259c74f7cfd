"""What URLs may carry of secrets does not get into text for people and logs; all else stays as it is."""

from __future__ import annotations

import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.redact import redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/run", "s3://***@bucket/run"),
        ("cannot read 'sftp://me:p%40ss@host:22/x': no", "cannot read 'sftp://***@host:22/x': no"),
        ("simplecache::s3://key:secret@bucket/x", "simplecache::s3://***@bucket/x"),
        ("ftp://token@host", "ftp://***@host"),
        ("ftp://a:b@c@host/x@y", "ftp://***@host/x@y"),
        ("a://u:one@h/ and b://u:two@h/", "a://***@h/ and b://***@h/"),
        ("https://h/x?sig=abc&se=2026#part", "https://h/x?sig=***&se=***#part"),
        ("https://h/x?X-Amz-Credential=a/b@c", "https://h/x?X-Amz-Credential=***"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("/home/a@b/run?x=1", "/home/a@b/run?x=1"),
        ("mail me@home: https://h/x is down, why? a=b", "mail me@home: https://h/x is down, why? a=b"),
        ("s3://bucket/with@sign", "s3://bucket/with@sign"),
    ],
)
def test_credentials_are_hidden_and_nothing_else(text, shown):
    assert redacted(text) == shown
    assert redacted(shown) == shown


ALPHABET = st.sampled_from("abcXYZ019:%-._~!$&()*+,;=@")


@given(user=st.text(ALPHABET, min_size=1), before=st.sampled_from(["", "x ", "'", '"', "(see "]))
def test_no_user_information_stays(user, before):
    url = f"proto://{user}@host/path"
    assert urlsplit(url).hostname == "host", "the oracle: what stands before the last @ is not the host"
    assert redacted(f"{before}{url} tail") == f"{before}proto://***@host/path tail"


def test_logs_are_redacted_with_their_tracebacks():
    code = """
import logging
from storage.redact import redact_logging
redact_logging(); redact_logging()
try:
    raise OSError("ftp://u:planted@h/x is away")
except OSError:
    logging.getLogger("a").exception("cannot read %s, %d times", "s3://k:planted@b/x", 3)
raise RuntimeError("the end of http://me:planted@h")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("RuntimeError: the end of http://***@h\n")
    assert "cannot read s3://***@b/x, 3 times" in done.stderr
    assert "OSError: ftp://***@h/x is away" in done.stderr and "Traceback" in done.stderr
    assert "planted" not in done.stderr
