"""Share what the events of the tabs have in common: arguments of ``click`` and the like, starting and stopping."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from app.drawing.requests import DrawingRequests
from app.history.history import Kept
from app.page import theme
from app.server.visitors import DRAWING, visitor_of
from app.settings.checks import SettingsError

Values = Mapping[Any, Any]
"""Of components, as Gradio gives them where inputs are a set."""
TELLING: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUIET = {**TELLING, "queue": False}  # at once, but errors and messages reach the page through the queue alone
PREVIEWING = {**TELLING, "trigger_mode": "multiple", "concurrency_limit": None}

# in the browser, as the server may be gone
IDLE = """() => {
  delete sessionStorage.shiraDrawing
  return SHOWN.map((visible) => ({ __type__: 'update', visible, interactive: true }))
}"""


def gallery(elem_id: str, label: str = "Pictures", **options: Any) -> gr.Gallery:
    """Pictures to choose from, none of which opens larger."""
    fixed: dict[str, Any] = {"allow_preview": False, "interactive": False, "buttons": []}
    return gr.Gallery(label=label, type="filepath", elem_id=elem_id, **fixed, **options)


def picture(elem_id: str, label: str, **options: Any) -> gr.Image:
    """One picture, to be looked at and downloaded."""
    buttons: Any = ["download", "fullscreen"]
    fixed: dict[str, Any] = {"show_label": False, "format": "png", "interactive": False, "buttons": buttons}
    return gr.Image(label=label, elem_id=elem_id, **fixed, **options)


def at_most_often(show: Callable[[int, int], None], seconds: float = 0.25) -> Callable[[int, int], None]:
    """Show steps no more often than that, and the last one always.

    Each is an event for the browser: a small model draws 200 steps per second, and the page no longer answers a click.
    """
    shown = 0.0

    def on_step(done: int, of: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if done == of or now - shown >= seconds:
            shown = now
            show(done, of)

    return on_step


def caption_of(kept: Kept) -> str:
    """A kept picture's mix; nothing where its file was replaced by another."""
    try:
        return theme.caption(kept.settings)
    except SettingsError:
        return ""


def picked(names: Sequence[str], event: gr.EventData) -> str | None:
    """The name of the picture that was chosen in a gallery or a sheet."""
    index = getattr(event, "index", None)
    return names[index] if isinstance(index, int) and 0 <= index < len(names) else None


class DrawButtons:
    """Buttons that start a drawing, and Stop, which takes their place while it lasts.

    What is drawn is what the page held when a button was pressed, however long the requests take.

    Args:
        requests: where drawings are announced and stopped.
        task: what is drawn with them, as it is told to ``requests``.
        starts: the buttons that start a drawing.
        stop: ends what the visit has asked for with them.
    """

    def __init__(self, requests: DrawingRequests, task: str, starts: Sequence[gr.Button], stop: gr.Button) -> None:
        self._requests, self._task = requests, task
        self.asked: gr.State = gr.State()
        """Values of the inputs, as ``draw`` takes them."""
        self.all = [*starts, stop]
        self.begun = [*self.all, self.asked]
        stop.click(self._stop, **QUIET)

    def begin(self, asked: Any, request: gr.Request) -> list[Any]:
        """Announce a drawing; updates of ``begun``."""
        self._requests.announce(visitor_of(request).visit, self._task)
        return [*(gr.Button(visible=False) for _ in self.all[:-1]), gr.Button(visible=True), asked]

    def begin_on(self, pressed: Sequence[Any], inputs: set[Any], js: str) -> Any:
        """Announce a drawing when a button is pressed; that event."""
        return gr.on(pressed, self.begin, inputs, self.begun, js=js, **QUIET)

    def draw_after(self, begun: Any, draw: Any, outputs: Sequence[Any], progress_on: Any) -> None:
        """Draw after the event that announced it; the buttons come back when it has ended, however it ended."""
        private: dict[str, Any] = {"api_visibility": "private", "show_progress_on": progress_on}
        self.idle_after(begun.then(draw, self.asked, outputs, **private, **DRAWING))

    def idle_after(self, event: Any) -> None:
        """Let a drawing be started when an event has ended, however it ended."""
        for ended in (event.then, event.failure):  # after an error, browsers follow failure only
            shown = json.dumps([True] * (len(self.all) - 1) + [False])
            ended(None, None, self.all, js=IDLE.replace("SHOWN", shown), **QUIET)

    def _stop(self, request: gr.Request) -> None:
        self._requests.stop(visitor_of(request).visit, self._task)
