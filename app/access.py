"""Who may reach the app, and what the server refuses whoever asks."""

import ipaddress
import logging
import os
import stat
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.middleware import Middleware

from app.studio import Studio
from shira_diffusers import ShiraError

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Gradio would fetch what lies behind an address of another server and pass it on
_ELSEWHERE = ("/file=http:", "/file=https:", "/proxy=")


class AccessError(ShiraError):
    """Credentials that cannot be used; the message never holds a password."""


def read_credentials(auth: str | None, file: Path | None) -> list[tuple[str, str]] | None:
    """Users and passwords that may sign in; None lets everybody in who reaches the app.

    Args:
        auth: ``USER:PASSWORD``, which the list of processes shows.
        file: holds one of these a line; blank lines and those that begin with # count for nothing.

    Raises:
        AccessError: both are given, no such file, or a line that is none; no password is told.
    """
    if auth is not None and file is not None:
        raise AccessError("--auth and --auth-file are both given: expected one of them")
    if auth is not None:
        return [_user(auth, "--auth")]
    if file is None:
        return None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AccessError(
            f"cannot read --auth-file {file}: {type(error).__name__}; expected lines USER:PASSWORD"
        ) from None
    users = [
        _user(line, f"line {number} of {file}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    ]
    if not users:
        raise AccessError(f"{file} names no user, expected lines USER:PASSWORD")
    if os.name != "nt" and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("%s can be read by other users of this machine: chmod 600 keeps its passwords", file)
    return users


def _user(text: str, where: str) -> tuple[str, str]:
    user, _, password = text.partition(":")
    if not user.strip() or not password:
        raise AccessError(f"{where} must be USER:PASSWORD, got {'no user' if not user.strip() else 'no password'}")
    return user.strip(), password


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address that the app listens on."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def warn_if_open(host: str, *, share: bool, guarded: bool) -> None:
    """Put a warning on the log if others than this machine's users can reach the app without signing in."""
    if guarded or (is_local(host) and not share):
        return
    who = "whoever has its public link" if share else f"whoever reaches this machine at {host}"
    logger.warning(
        "%s can use this app without signing in, add and delete adapters and start trainings; "
        "ask for a password with --auth-file FILE (lines USER:PASSWORD)",
        who,
    )


def protection(studio: Studio) -> dict[str, Any]:
    """Options of Gradio's ``launch``: uploads of a size, folders that are never served, and no fetching elsewhere."""
    return {
        "max_file_size": int(studio.max_upload_mb * 1e6),
        "blocked_paths": [str(studio.data.resolve() / name) for name in ("adapters", "trash", "trainings")],
        "enable_monitoring": False,
        "app_kwargs": {"middleware": [Middleware(NothingElsewhere)]},
    }


class NothingElsewhere:
    """ASGI middleware that refuses to fetch for a visitor what other servers hold."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or pass the request on."""
        path = unquote(str(scope.get("path", ""))).lower()
        if scope["type"] == "http" and any(part in path for part in _ELSEWHERE):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"This app serves files of its own only."})
            return
        await self._app(scope, receive, send)
