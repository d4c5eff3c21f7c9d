"""Which network interface leads to the other hosts: gloo has to be told.

Gloo listens at the address that this host's own name stands for. On many machines that is the
loopback interface (Debian writes `127.0.1.1 NAME` into /etc/hosts), and no other host gets through.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterable

if sys.platform == "linux":
    import fcntl

SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of an interface."""


def use_interface_toward(addresses: Iterable[str]) -> None:
    """Lets gloo listen at the interface that leads to the first of `addresses` on another host.

    A GLOO_SOCKET_IFNAME that the user set stays; so does gloo's choice where nothing is found.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    for address in addresses:
        mine = own_address_toward(address)
        if mine and not ipaddress.ip_address(mine).is_loopback and (name := interface_of(mine)):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def own_address_toward(address: str) -> str:
    """This host's own IPv4 address on the way to `address`; "" where there is no way."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # nothing is sent
        return str(probe.getsockname()[0])
    return ""


def interface_of(address: str) -> str:
    """The name of the interface that has the IPv4 `address`; "" if none has, or off Linux."""
    if sys.platform != "linux":
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode())
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""
