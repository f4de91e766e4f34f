"""The endpoints for programs: ``/adapters`` and ``/generate``, to be called with ``gradio_client``."""

import json
from typing import Any

import gradio as gr
from gradio.events import api

from app.messages import readable
from app.settings import DEFAULT_GUIDANCE, DEFAULT_STEPS, SettingsError
from app.studio import Studio

DRAWING: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 4}
"""Of all events that draw: that many may be under way; the session lets them take turns, a picture each."""


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

    def generate(
        prompt: str,
        mix: Any = None,
        seed: float | None = None,
        steps: float = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
    ) -> tuple[gr.FileData, dict[str, Any]]:
        """Draw one picture with a mix {adapter: strength}, given as an object or as its JSON text; none is the base."""
        with readable():
            picture = session.generate(prompt, read_mix(mix), seed, steps, guidance)  # type: ignore[arg-type]
        file = paper.postprocess(picture.signed())
        return file.model_dump(), dict(picture.report)  # type: ignore[union-attr,return-value]

    api(adapters, api_name="adapters")
    api(generate, api_name="generate", **DRAWING)


def read_mix(mix: Any) -> Any:
    """A mix from JSON text, or as it is; none, or blank text, is empty.

    Raises:
        SettingsError: text that is no JSON.
    """
    if mix is None or (isinstance(mix, str) and not mix.strip()):
        return {}
    if not isinstance(mix, str):
        return mix
    try:
        return json.loads(mix)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SettingsError(f'the mix must be JSON like {{"name": 1.0}}, got {mix[:40]!r} ({error})') from error
