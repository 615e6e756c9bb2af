"""Which interface each transport of a lane takes: the choices of gloo, NCCL and Ray, made as they make them."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Mapping

from stagemesh.deployments.doctor.facts import Transport

SIOCGIFADDR = 0x8915  # <linux/sockios.h>
IFREQ = struct.Struct("256s")
LOOPBACK = "lo"
VIRTUAL = ("docker", "br-", "veth", "virbr", "cni", "podman")
"""Interfaces that lead into this machine's own containers."""


def is_local(interface: str) -> bool:
    """No other machine is behind it."""
    return interface == LOOPBACK or interface.startswith(VIRTUAL)


def interfaces() -> dict[str, str]:
    """IPv4 address by interface, of those that have one."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, IFREQ.pack(name.encode()))
            except OSError:  # it has no address
                continue
            addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses


def private_address() -> str:
    """The address of the interface that leads out, as Ray takes it; 127.0.0.1 where none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 53))  # sends nothing: asks for the route
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def transports(address: str, has_gpus: bool, environment: Mapping[str, str]) -> tuple[Transport, ...]:
    """address: the node's private address, that step plans (ZeroMQ) and Ray's own traffic use."""
    known = interfaces()
    zeromq = Transport(
        name="zeromq", interface=_interface_of(address, known), address=address, why="the node's private address"
    )
    gloo = gloo_transport(known, environment.get("GLOO_SOCKET_IFNAME", ""))
    if not has_gpus:
        return (zeromq, gloo)
    return (zeromq, gloo, nccl_transport(known, environment.get("NCCL_SOCKET_IFNAME", "")))


def gloo_transport(known: Mapping[str, str], asked: str) -> Transport:
    """asked: GLOO_SOCKET_IFNAME. Without it torch takes the first address of the host name that it can bind to, else
    the loopback."""
    if asked:
        name = asked.split(",")[0]
        return _named("gloo", name if name in known else "", known, f"GLOO_SOCKET_IFNAME={asked}")
    host = socket.gethostname()
    why = f"the host name {host!r} does not resolve to an address of this machine"
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, kind, _, _, place in found:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind(place)
            except OSError:
                continue
        address = str(place[0])
        interface = _interface_of(address, known)
        return Transport(
            name="gloo", interface=interface, address=address, why=f"the host name {host!r} resolves to it"
        )
    return _named("gloo", LOOPBACK, known, why)


def nccl_transport(known: Mapping[str, str], asked: str) -> Transport:
    """asked: NCCL_SOCKET_IFNAME: prefixes, `=` before exact names, `^` before what to leave out."""
    if asked:
        return _named("nccl", next(iter(_matching(known, asked)), ""), known, f"NCCL_SOCKET_IFNAME={asked}")
    for wanted in ("ib", "^docker,lo,virbr", "docker", "lo"):
        if names := _matching(known, wanted):
            return _named("nccl", names[0], known, "NCCL's own choice")
    return _named("nccl", "", known, "NCCL's own choice")


def _matching(known: Mapping[str, str], wanted: str) -> list[str]:
    is_excluding, wanted = wanted.startswith("^"), wanted.removeprefix("^")
    is_exact, wanted = wanted.startswith("="), wanted.removeprefix("=")
    words = wanted.split(",")
    return [
        name for name in known if (name in words if is_exact else name.startswith(tuple(words))) is not is_excluding
    ]


def _named(transport: str, interface: str, known: Mapping[str, str], why: str) -> Transport:
    return Transport(name=transport, interface=interface, address=known.get(interface, ""), why=why)


def _interface_of(address: str, known: Mapping[str, str]) -> str:
    if address.startswith("127.") or address == "::1":
        return LOOPBACK
    if (name := next((name for name, own in known.items() if own == address), None)) is not None:
        return name
    return _interface_of_ipv6(address)


def _interface_of_ipv6(address: str) -> str:
    try:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        with open("/proc/net/if_inet6", encoding="ascii") as table:
            rows = [line.split() for line in table]
    except OSError:  # not an IPv6 address, or none here
        return ""
    return next((row[5] for row in rows if row[0] == packed), "")


def has_token_auth(is_cluster: bool, environment: Mapping[str, str]) -> bool:
    """Ray's processes hand RAY_AUTH_MODE down to their workers. Where none runs yet, a Ray that `stagemesh serve`
    starts asks for a token unless that is switched off."""
    return environment.get("RAY_AUTH_MODE", "" if is_cluster else "token").lower() == "token"
