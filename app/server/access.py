"""Decide who may reach the app, and what the server refuses to everybody."""

import asyncio
import ipaddress
import json
import logging
import os
import secrets
import stat
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
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

BROWSER = "shira-browser"
"""The cookie by which a browser finds its own history again, where nobody signs in and histories are not shared."""
_A_YEAR = 365 * 24 * 60 * 60  # seconds

MAX_BODY = 32 * 2**20  # bytes of JSON; files come another way
_FORMS = (b"multipart/", b"application/x-www-form-urlencoded")
# Gradio would fetch what lies behind an address of another server and pass it on
_ELSEWHERE = ("/file=http:", "/file=https:", "/proxy=")


class AccessError(ShiraError):
    """Credentials that cannot be used; the message never holds a password."""


def read_credentials(auth: str | None, file: Path | None) -> list[tuple[str, str]] | None:
    """Users and passwords that may sign in; None lets everybody in who reaches the app.

    Args:
        auth: ``USER:PASSWORD``, which the list of processes shows.
        file: holds one of these per line; blank lines and those that begin with # are ignored.

    Raises:
        AccessError: both are given, no such file, or a malformed line; the message holds no password.
    """
    if auth is not None and file is not None:
        raise AccessError("--auth and --auth-file are both given: expected one of them")
    if auth is not None:
        return [_user(auth, "--auth")]
    if file is None:
        return None
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise AccessError(f"cannot read --auth-file {file}: {why}; expected lines USER:PASSWORD") from None
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
    who = "everybody with the public link" if share else f"everybody who reaches this machine at {host}"
    logger.warning(
        "%s can use this app without signing in, add and delete adapters and start trainings; "
        "ask for a password with --auth-file FILE (lines USER:PASSWORD)",
        who,
    )


def protection(studio: Studio) -> dict[str, Any]:
    """Options of Gradio's ``launch``: uploads of a size, folders that are never served, and no fetching elsewhere."""
    return {
        "max_file_size": int(studio.max_upload_mb * 1e6),
        "blocked_paths": [str(studio.data.resolve() / name) for name in ("adapters", "trash", "trainings", "pictures")],
        "enable_monitoring": False,
        "app_kwargs": {
            "middleware": [
                Middleware(NothingElsewhere),
                Middleware(CancelsOne),
                *([] if studio.galleries.shared else [Middleware(Known)]),
            ]
        },
    }


class NothingElsewhere:
    """ASGI middleware that refuses to fetch for a visitor what other servers hold: asked for, or sent as a "file"."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or pass the request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = unquote(str(scope.get("path", ""))).lower()
        refused = any(part in path for part in _ELSEWHERE)
        kind = dict(scope["headers"]).get(b"content-type", b"")
        if scope["method"] == "POST" and not kind.startswith(_FORMS):  # without a type, it is taken for JSON
            body = await _read(receive)
            refused = refused or body is None or _names_elsewhere(body)
            receive = _again(body or b"", receive)
        if not refused:
            return await self._app(scope, receive, send)
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"This app serves files of its own only."})


class Known:
    """ASGI middleware that gives each browser an unguessable name, with the page."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and add a cookie to the page if there was none."""
        if scope["type"] != "http" or scope["path"] != "/" or _has_cookie(scope):
            return await self._app(scope, receive, send)
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = f"{BROWSER}={secrets.token_urlsafe(24)}; Path=/; Max-Age={_A_YEAR}; HttpOnly; SameSite=Lax{secure}"

        async def send_with_cookie(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"set-cookie", cookie.encode())]}
            await send(message)

        await self._app(scope, receive, send_with_cookie)


class CancelsOne:
    """ASGI middleware that ends the call named in a request to ``/cancel``, and no other of the same client.

    Gradio by itself ends all calls of a client to the same endpoint.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, without the endpoint: Gradio tells the client and forgets the call."""
        if scope["type"] == "http" and scope["method"] == "POST" and str(scope["path"]).endswith("/cancel"):
            body = await _read(receive) or b""
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # Gradio refuses it
                call = json.loads(body)
                await _cancel(f"{call['session_hash']}_{call['fn_index']}<gradio-sep>{call['event_id']}")
                body = json.dumps(call | {"fn_index": -1}).encode()
            receive = _again(body, receive)
        await self._app(scope, receive, send)


async def _cancel(name: str) -> None:
    """Cancel the task of a name that Gradio has given it, and wait for its end."""
    ended = [task for task in asyncio.all_tasks() if task.get_name() == name]
    for task in ended:
        task.cancel()
    await asyncio.gather(*ended, return_exceptions=True)


def _has_cookie(scope: Scope) -> bool:
    cookies = b";".join(value for name, value in scope["headers"] if name == b"cookie")
    return f"{BROWSER}=".encode() in cookies


async def _read(receive: Receive) -> bytes | None:
    """A request's body; None of one that is too long."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then what comes after it."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> MutableMapping[str, Any]:
        return left.pop() if left else await receive()

    return give


def _names_elsewhere(body: bytes) -> bool:
    """Whether JSON names a file of another server, in whatever depth."""
    try:
        left = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # Gradio refuses it
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if str(value.get("path", "")).lower().startswith(("http:", "https:")):
                return True
            left += value.values()
        elif isinstance(value, list):
            left += value
    return False
