"""The page with a description of each parameter of its endpoints, for "Use via API" and for clients."""

from typing import Any

from gradio.utils import get_function_description

from app.server.messages import Page
from app.settings.settings import MAX_GUIDANCE, MAX_STEPS
from app.settings.strengths import MAX_STRENGTH, MIN_STRENGTH
from shira_diffusers.adapters.merge import MERGE_METHODS

SHARED = {
    "prompt": "What to draw.",
    "mix": "{adapter: strength}, as an object or as its JSON text; none is the base. A strength is a number from "
    f"{MIN_STRENGTH:g} to {MAX_STRENGTH:g}, or {{component: number}}, "
    'or {"unet": {"down" | "mid" | "up": number}}.',
    "seed": "A whole number from 0 to 4294967295; -1 or none draws one, which the report has.",
    "steps": f"1 to {MAX_STEPS}.",
    "guidance": f"0 to {MAX_GUIDANCE:g}: how closely the picture follows the prompt.",
    "method": f"How several adapters are merged: {', '.join(MERGE_METHODS)}.",
    "negative": "What the picture should not show.",
    "width": "In pixels; 0 is the model's own.",
    "height": "In pixels; 0 is the model's own.",
    "start_image": "The name of a picture to start from, as /add_start_image returns it.",
    "change": "0.01 to 1: how much of the start image is drawn anew.",
    "negative_mix": "0 to 1: the part of the mix in guidance's negative half; 1 is as usual, at 0.5 guidance "
    "drives the styles too.",
    "prompts": "A list, or text with one per line.",
    "count": "Pictures of each prompt.",
    "seeds": '"fixed", "next" or "random".',
    "settings": "An object like the parameters of /generate, or its JSON text.",
    "axes": "A list of {kind, values, style}, or its JSON text.",
    "file": "As handle_file(path).",
    "id": "Of a training, as /trainings lists it; none is the newest.",
}
"""Of parameters that mean the same in several endpoints; the others are in the docstrings."""


class DescribedPage(Page):
    """Blocks whose endpoints describe their parameters."""

    def get_api_info(self, *args: Any, **options: Any) -> Any:
        """What Gradio knows of the endpoints, and the ``Args`` of their docstrings."""
        info = super().get_api_info(*args, **options)
        functions = {f"/{each.api_name}": each.fn for each in self.fns.values() if each.fn}
        for name, endpoint in info["named_endpoints"].items():
            described = get_function_description(functions[name])[1]
            for parameter in endpoint["parameters"]:
                known = parameter["parameter_name"]
                parameter["label"] = known
                parameter["python_type"]["description"] = described.get(known) or SHARED.get(known, "")
        return info
