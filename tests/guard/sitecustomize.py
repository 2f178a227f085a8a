"""Network guard: in any Python process started with this folder on PYTHONPATH, only loopback connections are allowed.

An attempt raises OSError, and is written to the file named in NETWORK_GUARD_LOG (if set), since a library may swallow the error.
"""

import ipaddress
import os
import socket


def _is_local(host) -> bool:
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


def _refuse(what: str):
    if log := os.environ.get("NETWORK_GUARD_LOG"):
        with open(log, "a") as out:
            out.write(what + "\n")
    raise OSError(f"network guard: {what} was tried, and only loopback connections are allowed here")


class _GuardedSocket(socket.socket):
    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            _refuse(f"a connection to {address[0]}")
        return super().connect(address)

    def connect_ex(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            _refuse(f"a connection to {address[0]}")
        return super().connect_ex(address)


_getaddrinfo = socket.getaddrinfo


def _guarded_getaddrinfo(host, *args, **kwargs):
    if not _is_local(host):
        _refuse(f"a look-up of {host}")
    return _getaddrinfo(host, *args, **kwargs)


socket.socket = _GuardedSocket
socket.getaddrinfo = _guarded_getaddrinfo
