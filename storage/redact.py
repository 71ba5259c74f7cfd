"""Text for people and logs, without the secrets that URLs carry. Standard library only."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from types import TracebackType

HIDDEN = "***"

# The user information of a URL's authority (RFC 3986, section 3.2.1), up to the last @ before the path, and the values
# of its query, where signed URLs keep theirs. Credentials belong into the environment; some stores take them here.
_USER = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_QUERY = re.compile(r"(\w://[^?\s'\"]*\?)([^\s'\"]+)")
_VALUE = re.compile(r"=[^&#]*")


def redacted(text: str) -> str:
    """`text` with what stands before the @ of each URL in it, and the values of its query, replaced by ``***``."""
    if "://" not in text:
        return text
    text = _USER.sub(f"{HIDDEN}@", text)
    return _QUERY.sub(lambda match: match.group(1) + _VALUE.sub(f"={HIDDEN}", match.group(2)), text)


def redact_logging() -> None:
    """From here on every record that this process logs is redacted, and so is the traceback of what ends it.

    May be called again.
    """
    sys.excepthook = _last_words
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def factory(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg, record.args = redacted(record.getMessage()), ()
        if record.exc_info:
            # Handlers print exc_text as it is when it is there.
            record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
        return record

    factory.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(factory)


def _last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))
