"""What a pipeline takes beside a prompt: a negative one, a size, a picture to start from, a weaker negative half."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from diffusers import AutoPipelineForImage2Image
from PIL import ImageOps
from PIL.Image import Image

from app.settings.settings import Settings
from app.settings.strengths import is_by_part
from shira_diffusers.integrations.lora_scale import KEYWORDS
from shira_diffusers.integrations.negative_half import KEY


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a base allows.

    Args:
        negative: whether a negative prompt has an effect.
        side: of the model's own square pictures, in pixels; 0 where the size cannot be chosen.
        multiple: what width and height must be a multiple of.
        image_to_image: a pipeline of the same models that starts from a picture; None where there is none.
        negative_mix: the argument that takes a part of the mix for guidance's negative half; empty where there is none.
    """

    negative: bool
    side: int
    multiple: int
    image_to_image: Any
    negative_mix: str

    @classmethod
    def of(cls, pipe: Any) -> Self:
        """Those of a text-to-image pipeline."""
        takes = inspect.signature(pipe.__call__).parameters
        factor = getattr(pipe, "vae_scale_factor", 0)
        latents = getattr(pipe, "default_sample_size", 0) or getattr(_config(pipe, "unet"), "sample_size", 0)
        side = latents * factor if isinstance(latents, int) and {"width", "height"} <= takes.keys() else 0
        # Flux reads one only with true_cfg_scale, which would cost each picture twice its time
        negative = "negative_prompt" in takes and "true_cfg_scale" not in takes
        return cls(negative, side, max(8, 2 * factor), _image_to_image(pipe), _negative_mix(pipe))

    def problems(self, settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
        """What the base does not allow, a sentence each, with the settings that do without."""
        if settings.negative and not self.negative:
            yield "this model takes no negative prompt", {"negative": ""}
        if settings.start_image and not self.image_to_image:
            yield "this model cannot start from a picture", {"start_image": ""}
        if settings.negative_mix != 1 and not self.negative_mix:
            yield "this model has no negative half of guidance with other styles", {"negative_mix": 1.0}
        elif settings.negative_mix != 1 and any(map(is_by_part, settings.mix.values())):
            yield (
                "the negative half takes a part of one strength per style, not of down, mid and up",
                {"negative_mix": 1.0},
            )
        for what, pixels in (("width", settings.width), ("height", settings.height)):
            low, high = self.limits
            if pixels and not self.side:
                yield f"this model draws pictures of one {what}, got {pixels}", {what: 0}
            elif pixels and (pixels % self.multiple or not low <= pixels <= high):
                expected = f"a multiple of {self.multiple} from {low} to {high}"
                yield f"the {what} must be {expected} for this model, got {pixels}", {what: 0}

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the most of width and height: beyond half and twice its own side a model draws no picture."""
        return -(-self.side // 2 // self.multiple) * self.multiple, 2 * self.side

    def options(self, settings: Settings) -> dict[str, Any]:
        """What the settings add to a call of the pipeline."""
        sizes = {"width": settings.width, "height": settings.height}
        negative = {"negative_prompt": settings.negative} if settings.negative else {}
        weaker = {self.negative_mix: {KEY: settings.negative_mix}} if settings.negative_mix != 1 else {}
        return negative | weaker | {what: pixels for what, pixels in sizes.items() if pixels}

    def fitted(self, image: Image, settings: Settings) -> Image:
        """A picture to start from, cut to the size of the one that is to be drawn, or else to the model's own."""
        return ImageOps.fit(image, (settings.width or self.side, settings.height or self.side))


def _config(pipe: Any, component: str) -> Any:
    return getattr(getattr(pipe, component, None), "config", None)


def _negative_mix(pipe: Any) -> str:
    """Both halves must be in one batch, and nothing else: perturbed attention has a third part."""
    kind = type(pipe)
    halves = hasattr(kind, "do_classifier_free_guidance") and not hasattr(kind, "do_perturbed_attention_guidance")
    takes = inspect.signature(pipe.__call__).parameters
    return next((name for name in KEYWORDS if halves and name in takes), "")


def _image_to_image(pipe: Any) -> Any:
    try:
        found = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError:  # diffusers has none for this pipeline
        return None
    found.set_progress_bar_config(disable=True)
    return found
