"""Three network namespaces in a row, prefill – router – decode, made without touching anything that exists.

They have no names: they live as long as a process holds them, so whatever kills that process removes them,
interfaces, rules and all, and two runs cannot collide. Both hosts believe themselves on one Ethernet, each knowing
the other's address beforehand (no ARP). For the packet backend that is what the forwarder makes true; for the
kernel's backends the router's ends answer to the far host's address.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from repro.errors import UserError
from repro.link import kernel
from repro.link.spec import LinkSpec, Side

ADDRESSES: dict[Side, str] = {"prefill": "10.77.0.1", "decode": "10.77.0.2"}
_ETHERNET: dict[Side, str] = {"prefill": "02:00:00:4d:00:01", "decode": "02:00:00:4d:00:02"}
#: The router's interface towards each side; the side's own is HOST_END.
ROUTER_END: dict[Side, str] = {"prefill": "to-prefill", "decode": "to-decode"}
HOST_END = "link0"

#: Where the keeper holds the sides' namespaces, so that others find them by its process number alone.
_DESCRIPTORS: dict[Side, int] = {"prefill": 200, "decode": 201}

_SMALLEST_BUFFER_BYTES = 4 << 20
_LARGEST_BUFFER_BYTES = 512 << 20


def other(side: Side) -> Side:
    """The side across the link."""
    return "decode" if side == "prefill" else "prefill"


@dataclass(frozen=True)
class Namespaces:
    """The three namespaces as file descriptors of this process, which itself is in the router's."""

    router: int
    sides: dict[Side, int]
    rootless: bool

    @contextlib.contextmanager
    def inside(self, side: Side) -> Iterator[None]:
        """Run a block in the namespace of a side."""
        kernel.enter(self.sides[side])
        try:
            yield
        finally:
            kernel.enter(self.router)


def inside(keeper: int, side: Side, argv: Sequence[str]) -> list[str]:
    """`argv`, run in a side's namespace of the link that the process `keeper` holds. It keeps the number of the process that runs it."""
    held = Path(f"/proc/{keeper}")
    try:
        rootless = (held / "ns/user").readlink() != Path("/proc/self/ns/user").readlink()
    except OSError:
        raise UserError(f"link: process {keeper} holds no link any more") from None
    user = ["--preserve-credentials", f"--user={held}/ns/user"] if rootless else []
    return ["nsenter", *user, f"--net={held}/fd/{_DESCRIPTORS[side]}", "--", *argv]


def make() -> Namespaces:
    """Leave this process's network for three new namespaces, inside a new user namespace where privilege is missing.

    The process must have a single thread. Raises UserError where neither is allowed.
    """
    rootless = False
    try:
        kernel.unshare(kernel.CLONE_NEWNET)
    except PermissionError:
        rootless = True
        user, group = os.geteuid(), os.getegid()
        try:
            kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNET)
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        except OSError as error:
            raise UserError(f"neither root nor an unprivileged user namespace ({error.strerror})") from None
    for descriptor in _DESCRIPTORS.values():
        os.dup2(os.open("/proc/self/ns/net", os.O_RDONLY), descriptor, inheritable=False)
        kernel.unshare(kernel.CLONE_NEWNET)
    router = os.open("/proc/self/ns/net", os.O_RDONLY)
    return Namespaces(router, dict(_DESCRIPTORS), rootless)


def connect(namespaces: Namespaces, spec: LinkSpec, *, routed: bool, segment: bool) -> None:
    """Make and configure the interfaces.

    `routed` lets the kernel forward between them; with `segment` hosts hand over single segments instead of
    super-packets.
    """
    _quiet_ipv6()
    for side, end in ROUTER_END.items():
        peer = f"{HOST_END} mtu {spec.mtu_bytes} netns /proc/{os.getpid()}/fd/{namespaces.sides[side]}"
        _ip(
            f"link add {end} mtu {spec.mtu_bytes} type veth peer name {peer}",
            *([f"link set {end} address {_ETHERNET[other(side)]}"] if routed else []),
            f"link set {end} up",
        )
    for side in ADDRESSES:
        far = other(side)
        with namespaces.inside(side):
            _quiet_ipv6()
            _ip(
                "link set lo up",
                f"link set {HOST_END} address {_ETHERNET[side]}",
                *([f"link set {HOST_END} gso_max_segs 1"] if segment else []),
                f"link set {HOST_END} up",
                f"addr add {ADDRESSES[side]}/30 dev {HOST_END}",
                f"neigh add {ADDRESSES[far]} lladdr {_ETHERNET[far]} dev {HOST_END} nud permanent",
            )
    if routed:
        _sysctl("ipv4/ip_forward", "1")
        for side, end in ROUTER_END.items():
            _ip(
                f"route add {ADDRESSES[side]}/32 dev {end}",
                f"neigh add {ADDRESSES[side]} lladdr {_ETHERNET[side]} dev {end} nud permanent",
            )


def tune_tcp(namespaces: Namespaces, spec: LinkSpec) -> tuple[dict[str, int | str], list[str]]:
    """Fit both hosts' TCP to the link; returns what is in force and what could not be had.

    Buffers may grow to twice what the pipe and its queue hold, doubled again because the kernel charges them for its
    own overhead. No memory of earlier connections: each shall find the link as new.
    """
    queue = min(max(spec.queue_limit_bytes("forward"), spec.queue_limit_bytes("reverse")), _LARGEST_BUFFER_BYTES)
    largest = int(min(max(4 * (spec.bdp_bytes() + queue), _SMALLEST_BUFFER_BYTES), _LARGEST_BUFFER_BYTES))
    if spec.base_rate_bps("forward") is None:
        largest = 32 << 20
    lost: list[str] = []
    unknown: list[str] = []
    for side in ADDRESSES:
        with namespaces.inside(side):
            _sysctl("ipv4/tcp_wmem", f"4096 131072 {largest}")
            _sysctl("ipv4/tcp_rmem", f"4096 131072 {largest}")
            _sysctl("ipv4/tcp_no_metrics_save", "1")
            if spec.rto_min_s is not None:
                try:
                    _sysctl("ipv4/tcp_rto_min_us", str(max(round(1e6 * spec.rto_min_s), 1)))
                except OSError:
                    lost.append("smallest retransmission timeout: not to be set in this kernel")
            if spec.congestion_control is not None:
                try:
                    _congestion_control(side, spec.congestion_control)
                except UserError:
                    unknown = [f"congestion control {spec.congestion_control}: not in this kernel"]
            control = _path("ipv4/tcp_congestion_control").read_text().strip()
    if spec.congestion_control is not None and not unknown:
        control = spec.congestion_control
    return {"tcp_buffer_bytes": largest, "congestion_control": control}, [*dict.fromkeys(lost), *unknown]


def _congestion_control(side: Side, name: str) -> None:
    """Of every connection over the link, unless a program chooses its own.

    It is an attribute of the route: a namespace may only have those as its default that the host lets everybody use,
    and for that the host would have to be changed.
    """
    network = f"{ADDRESSES['prefill'].rpartition('.')[0]}.0/30"
    _ip(f"route replace {network} dev {HOST_END} src {ADDRESSES[side]} proto kernel scope link congctl {name}")


def _quiet_ipv6() -> None:
    """Without it no neighbour discovery or router solicitation crosses the link on its own."""
    with contextlib.suppress(OSError):
        _sysctl("ipv6/conf/all/disable_ipv6", "1")
        _sysctl("ipv6/conf/default/disable_ipv6", "1")


def _ip(*lines: str) -> None:
    try:
        done = subprocess.run(
            ["ip", "-batch", "-"], input="\n".join(lines), capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UserError("`ip` of iproute2 is not installed") from None
    if done.returncode != 0:
        raise UserError(f"`ip` refused: {' '.join(done.stderr.split())}")


def _path(name: str) -> Path:
    return Path("/proc/sys/net") / name


def _sysctl(name: str, value: str) -> None:
    _path(name).write_text(value)
