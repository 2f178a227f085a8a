"""Network guard: with this folder on PYTHONPATH, a Python process may only connect to loopback.

An attempt raises OSError, noted in NETWORK_GUARD_LOG (if set): a library may swallow it."""

import ipaddress
import os
import socket


def _check(what: str, host) -> None:
    """OSError unless `host` is this machine."""
    if host in (None, "", "localhost", socket.gethostname()):
        return
    try:
        if ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback:
            return
    except ValueError:
        pass  # a name
    if log := os.environ.get("NETWORK_GUARD_LOG"):
        with open(log, "a") as out:
            out.write(f"{what} {host}\n")
    raise OSError(f"network guard: {what} {host} was tried, and only loopback is allowed here")


class _GuardedSocket(socket.socket):
    def connect(self, address, how="connect"):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check("a connection to", address[0])
        return getattr(super(), how)(address)

    def connect_ex(self, address):
        return self.connect(address, "connect_ex")


def _guarded_getaddrinfo(host, *args, **kwargs):
    _check("a look-up of", host)
    return _getaddrinfo(host, *args, **kwargs)


_getaddrinfo = socket.getaddrinfo
socket.socket = _GuardedSocket
socket.getaddrinfo = _guarded_getaddrinfo
