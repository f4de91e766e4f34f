"""Identify visitors, and share what the events and the endpoints of the app have in common."""

import json
from typing import Any

import gradio as gr

from app.history.galleries import Visitor
from app.server.access import BROWSER
from app.settings.checks import SettingsError

DRAWING: dict[str, Any] = {"concurrency_limit": None}
"""Of all events that draw: they wait without a thread, in the fair queue of the session."""
COMPARING: dict[str, Any] = {"concurrency_id": "comparing", "concurrency_limit": 2}
"""Of all events that compare adapters."""
STARTING: dict[str, Any] = {"concurrency_id": "training", "concurrency_limit": 1}
"""Of all events that start a training."""


def visitor_of(request: gr.Request) -> Visitor:
    """Who asks: a page, or a client; pictures belong to the user who signed in, or else to the browser."""
    visit = request.session_hash or ""
    browser = request.request.cookies.get(BROWSER) if request.request else None
    if request.username:
        return Visitor(visit, f"user {request.username}")
    return Visitor(visit, f"browser {browser}" if browser else f"visit {visit}")


def as_object(value: Any, what: str) -> Any:
    """A value from JSON text, or as it is; none, or blank text, is an empty object.

    Raises:
        SettingsError: text that is no JSON.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        example = '{"name": 1.0}' if what == "mix" else "an object or a list"
        raise SettingsError(f"the {what} must be JSON like {example}, got {value[:40]!r} ({error})") from error
