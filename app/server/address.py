"""The address that the app listens on, tried before anything is loaded."""

import socket
from contextlib import closing

from shira_diffusers import ShiraError


def require_address(host: str, port: int) -> None:
    """Require that the app can listen there.

    Raises:
        ShiraError: no port, no address of this machine, or another program listens there.
    """
    if not 1 <= port <= 65535:
        raise ShiraError(f"--port must be a number from 1 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such address"
        raise ShiraError(
            f"cannot listen at {host}, port {port}: {reason}; choose others with --host and --port"
        ) from error
