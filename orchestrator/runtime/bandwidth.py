"""What the link from another node carries, over the wires on which snapshots are copied: the road of a recovery.

Who measures whom, and what follows, is in nodes.py (`check_links`).
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from storage.wires import PeerError, Wire, open_wire

PROBE = "probe-link"
"""The service's name."""
PROBE_BYTES = 64 * 1024 * 1024
"""In each direction: half a second of a link of 1 Gb/s, and past what a shaper lets through in one burst."""
PIECE_BYTES = 1024 * 1024
PROBE_S = 5.0
"""Of a link that is slow no more is measured than what it has carried by then."""
OPEN_S = 15.0
"""To reach the other node, beyond PROBE_S."""
MEASURED_S = PROBE_S + 2 * OPEN_S
"""For an agent to say what a link carries."""


async def serve(request: dict[str, Any], wire: Wire) -> None:
    """Send PROBE_BYTES to whoever asks for them."""
    piece = bytes(PIECE_BYTES)
    deadline = time.monotonic() + PROBE_S + OPEN_S
    for _ in range(PROBE_BYTES // PIECE_BYTES):
        wire.writer.write(piece)
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            await wire.writer.drain()


async def rate_mb_s(address: str, token: str) -> float:
    """MB/s (10^6 bytes) from the node that serves `address` to this one.

    Raises:
        PeerError: it cannot be reached, or breaks off.
    """
    n_bytes, began = 0, time.monotonic()
    try:
        async with open_wire(address, token, {"op": PROBE}) as wire:
            began = time.monotonic()
            async with asyncio.timeout(PROBE_S):
                while n_bytes < PROBE_BYTES:
                    piece = await wire.reader.read(PIECE_BYTES)
                    if not piece:
                        raise PeerError(f"{address} has sent {n_bytes} of {PROBE_BYTES} bytes")
                    n_bytes += len(piece)
    except TimeoutError:
        pass  # what it has carried until now is its rate
    except OSError as e:
        raise PeerError(f"{address}: {e!r}") from e
    return n_bytes / 1e6 / max(time.monotonic() - began, 1e-6)
