"""Late packets: what leaves a node goes through a process that holds each packet back, then sends it on.

A TUN device and a rule for routes take the packets there, and a raw socket whose mark the rule leaves out sends them.
Kernels without netem can do this, too; and with the process its device is gone, and with that the delay.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import select
import socket
import struct
import subprocess
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import psutil

from orchestrator.chaos import apart

NEEDS = (
    "net-delay needs ip, /dev/net/tun and CAP_NET_ADMIN and CAP_NET_RAW on the node (in Kubernetes: "
    "securityContext.capabilities.add NET_ADMIN and NET_RAW)"
)
DEVICE = "shepherd-late"
MARK = 0x5E9
"""Of the packets that have been held back. Also the number of the table of routes."""
PREFERENCE = "99"
"""Of the rule: after the local addresses, before all that a node is likely to have."""
PACKETS_HELD = 100_000
"""More are dropped, as a queue of a network does."""
PACKET_BYTES = 65_536
TOOL_DEADLINE_S = 15.0
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_STRICT = 1


def delay(own: str, late_ms: int, seconds: float) -> str:
    """Have every IPv4 packet that leaves this node be late from now on, for `seconds`; what was done. Blocks.

    Args:
        own: this node's address.

    Raises:
        PermissionError: this process may not do that, or cannot.
        ValueError: the node's address or its kernel's settings do not allow it; the message says what to do.
    """
    device = _device_of(own)
    filters = (Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").read_text() for name in ("all", device))
    if max(map(int, filters)) == _STRICT:
        raise ValueError(f"net-delay: packets for {own} would be dropped; set net.ipv4.conf.all.rp_filter to 2")
    if os.path.exists(f"/sys/class/net/{DEVICE}"):
        raise ValueError("net-delay: packets of this node are late already")
    os.close(_open_device())  # seen to work, before anybody is told so
    arguments = ("--own", own, "--late-ms", str(late_ms), "--seconds", str(seconds))
    return apart.begin(__name__, *arguments)


def _device_of(address: str) -> str:
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address and entry.family == socket.AF_INET for entry in entries):
            return name
    raise ValueError(f"net-delay: {address} is no IPv4 address of this node")


def _open_device() -> int:
    """Raises PermissionError."""
    try:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError as e:
        raise PermissionError(f"{NEEDS}: {e}") from e
    return tun


def hold_back(own: str, late_ms: int, seconds: float) -> None:
    """Do it, and say so on standard output."""
    rule = ["pref", PREFERENCE, "not", "fwmark", str(MARK), "lookup", str(MARK)]
    tun = _open_device()
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as out:
        out.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        _ip("link", "set", DEVICE, "up")
        _ip("route", "replace", "default", "dev", DEVICE, "src", own, "table", str(MARK))
        _ip("rule", "add", *rule)
        try:
            apart.tell(f"packets that leave {own} are {late_ms} ms late for {seconds:g} s")
            _pass_on(tun, out, late_ms / 1000, time.monotonic() + seconds)
        finally:
            _ip("rule", "del", *rule)  # what is held then is lost, and sent again by TCP


def _pass_on(tun: int, out: socket.socket, late_s: float, until: float) -> None:
    held: deque[tuple[float, bytes]] = deque()
    while (now := time.monotonic()) < until:
        while held and held[0][0] <= now:
            _send(out, held.popleft()[1])
        wait_s = min(held[0][0] if held else until, until) - now
        if select.select([tun], [], [], max(0.0, wait_s))[0]:
            packet = os.read(tun, PACKET_BYTES)
            if len(held) < PACKETS_HELD:
                held.append((time.monotonic() + late_s, packet))


def _send(out: socket.socket, packet: bytes) -> None:
    """One that cannot be sent is lost, as packets are."""
    if packet[0] >> 4 != 4:
        return
    try:
        out.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))
    except OSError as e:
        if e.errno not in (errno.EMSGSIZE, errno.ENOBUFS, errno.EPERM, errno.EHOSTUNREACH, errno.ENETUNREACH):
            raise


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=TOOL_DEADLINE_S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Holds back the packets that leave this node.")
    parser.add_argument("--own", required=True)
    parser.add_argument("--late-ms", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    apart.leave()
    with suppress(KeyboardInterrupt):
        hold_back(given.own, given.late_ms, given.seconds)
