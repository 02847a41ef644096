"""Hosts on one machine: a network namespace for each rank, a slow link to a common bridge.

On one machine gloo's ranks talk over the loopback device, faster than two cores can fill it, so
layouts differ only by their overheads. Behind a slow link each, they become bound by bandwidth, as
GPUs are.

Needs root and iproute2. Nothing leaves the machine: the bridge has no way out.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.99.0"  # of the bridge; 254 hosts
BRIDGE = "helixbr0"


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """A set of emulated hosts; host k is for rank k."""

    count: int

    address: str = f"{NETWORK}.254"

    def enter(self, rank: int) -> dict[str, str]:
        """Move this process to its host; to be the ``enter`` of the launcher's ``Ranks``."""
        with open(f"/var/run/netns/{_host(rank)}") as namespace:
            os.setns(namespace.fileno(), os.CLONE_NEWNET)
        return {"GLOO_SOCKET_IFNAME": _end(rank)}

    def sent_bytes(self, rank: int) -> int:
        """Bytes that have left the host since it was made, all headers included."""
        path = f"/sys/class/net/{_end(rank)}/statistics/tx_bytes"
        result = subprocess.run(
            ["ip", "netns", "exec", _host(rank), "cat", path],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(result.stdout)


@contextlib.contextmanager
def emulated_hosts(count: int, rate: str) -> Iterator[Hosts]:
    """``count`` hosts whose links send at ``rate``, in the words of ``tc``: 20mbit.

    Raises:
        PermissionError: without root.
        FileNotFoundError: without iproute2.
    """
    if os.geteuid() != 0:
        raise PermissionError("network namespaces need root: run the benchmark as root")
    if not (shutil.which("ip") and shutil.which("tc")):
        raise FileNotFoundError("ip and tc are missing: install the package iproute2")
    _remove(count)
    try:
        _run(f"ip link add {BRIDGE} type bridge")
        _run(f"ip addr add {NETWORK}.254/24 dev {BRIDGE}")
        _run(f"ip link set {BRIDGE} up")
        for rank in range(count):
            host, end, port = _host(rank), _end(rank), f"helixp{rank}"
            inside = f"ip netns exec {host}"
            _run(f"ip netns add {host}")
            _run(f"ip link add {port} type veth peer name {end} netns {host}")
            _run(f"ip link set {port} master {BRIDGE}")
            _run(f"ip link set {port} up")
            _run(f"{inside} ip addr add {NETWORK}.{rank + 1}/24 dev {end}")
            _run(f"{inside} ip link set {end} up")
            _run(f"{inside} ip link set lo up")
            _run(f"{inside} tc qdisc add dev {end} root tbf rate {rate} burst 256kb limit 200mb")
        yield Hosts(count=count)
    finally:
        _remove(count)


def _remove(count: int) -> None:
    """Take away what is there of an earlier or of this set of hosts."""
    for rank in range(count):
        if Path(f"/var/run/netns/{_host(rank)}").exists():
            _run(f"ip netns del {_host(rank)}")
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        _run(f"ip link del {BRIDGE}")


def _host(rank: int) -> str:
    return f"helix{rank}"


def _end(rank: int) -> str:
    return f"helixe{rank}"


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)
