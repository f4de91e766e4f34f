"""The endpoints for programs: ``/adapters`` and ``/generate``, to be called with ``gradio_client``."""

from typing import Any

import gradio as gr
from gradio.events import api

from app.server.messages import readable
from app.server.visitors import DRAWING, as_object, visitor_of
from app.settings.settings import DEFAULT_GUIDANCE, DEFAULT_METHOD, DEFAULT_STEPS
from app.studio import Studio


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
