"""How the tabs' events are told to Gradio: what the arguments of ``click`` and the like have in common."""

from typing import Any

TELLING: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUIET = {**TELLING, "queue": False}  # at once, but errors and messages reach the page through the queue alone
PREVIEWING = {**TELLING, "trigger_mode": "multiple", "concurrency_limit": None}
