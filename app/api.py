"""The endpoints for programs: ``/adapters`` and ``/generate``, to be called with ``gradio_client``."""

import json
from typing import Any

import gradio as gr
from gradio.events import api

from app.access import BROWSER
from app.archive import Visitor
from app.messages import readable
from app.settings import DEFAULT_GUIDANCE, DEFAULT_METHOD, DEFAULT_STEPS, SettingsError
from app.studio import Studio

DRAWING: dict[str, Any] = {"concurrency_limit": None}
"""Of all events that draw: they wait without a thread, and the session lets visits take turns, a picture each."""


def add_api(studio: Studio) -> None:
    """Add the endpoints to the Blocks that is being built."""
    session = studio.session
    paper = gr.Image(format="png", type="pil", visible=False)

    def adapters() -> dict[str, Any]:
        """What is loaded: the model, its adapters by name with their metadata, and files left out with the reason."""
        return {
            "model": session.model,
            "adapters": {card.name: card.as_dict() for card in session.cards},
            "refused": dict(session.library.refused),
        }

    async def generate(
        request: gr.Request,
        prompt: str,
        mix: Any = None,
        seed: float | None = None,
        steps: float = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        method: str = DEFAULT_METHOD,
    ) -> tuple[gr.FileData, dict[str, Any]]:
        """Draw one picture with a mix {adapter: strength}, given as an object or as its JSON text; none is the base.

        A strength is a number from -1 to 2, or {component: number}, or {"unet": {"down" | "mid" | "up": number}}.
        """
        with readable():
            settings = session.checked(prompt, as_object(mix, "mix"), seed, steps, guidance, method)
            picture, _ = await studio.desk.draw(visitor_of(request), settings)
        file = paper.postprocess(picture.signed())
        return file.model_dump(), dict(picture.report)  # type: ignore[union-attr,return-value]

    api(adapters, api_name="adapters")
    api(generate, api_name="generate", **DRAWING)


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
