"""A resident pipeline with a shelf of adapters, drawing one picture at a time. No Gradio in here."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image

from app.picture import Picture
from app.settings import DEFAULT_GUIDANCE, DEFAULT_STEPS, Settings, SettingsError
from app.shelf import Card, Shelf, load_shelf, read_suggestions
from shira_diffusers import ShiraError
from shira_diffusers.pipeline import resident_of

OnStep = Callable[[int, int], None]
"""``on_step(done, of)``, called after each denoising step; an exception from it ends the generation."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Dtype = Literal["float32", "float16", "bfloat16"]


class Session:
    """Draws pictures with any mix of the adapters of a shelf; safe to use from several threads.

    Between pictures no adapter is active. Pictures take turns: each is byte for byte what the same settings give
    alone, whatever others draw meanwhile.

    Args:
        pipe: a text-to-image pipeline, on its device.
        model: its name, for reports.
        shelf: the adapters loaded into it.
        suggestions: prompts that it draws well.
    """

    def __init__(self, pipe: Any, model: str, shelf: Shelf, suggestions: tuple[str, ...]) -> None:
        self.model = model
        self.shelf = shelf
        self.suggestions = suggestions
        self._pipe = pipe
        self._turn = threading.Lock()
        self._pipe.set_progress_bar_config(disable=True)

    @classmethod
    def open(cls, base: str, adapters: Path, *, device: str = "cpu", dtype: Dtype = "float32") -> Self:
        """Load a pipeline and all adapters of a folder.

        Args:
            base: a folder, or a Hub id.
            adapters: files that do not fit are listed in ``shelf.refused``.
            device: as torch names it.
            dtype: of the weights.

        Raises:
            ShiraError: there is no such folder, or no pipeline in it.
        """
        if not adapters.is_dir():
            raise ShiraError(f"no folder of adapters at {adapters}; name one with --adapters")
        try:
            pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=DTYPES[dtype]).to(device)
        except (OSError, ValueError) as error:
            raise ShiraError(
                f"cannot load a pipeline from {base!r}, expected a diffusers folder or a Hub id; "
                f"name one with --base ({error})"
            ) from error
        shelf = load_shelf(pipe, adapters)
        return cls(pipe, Path(base).name, shelf, read_suggestions(Path(base), adapters))

    @property
    def cards(self) -> tuple[Card, ...]:
        """The loaded adapters, by name."""
        return self.shelf.cards

    @property
    def active(self) -> dict[str, Any]:
        """The adapters active now: none, but while a picture is drawn."""
        return resident_of(self._pipe).active

    def generate(
        self,
        prompt: str,
        mix: Mapping[str, float],
        seed: int | None = None,
        steps: int = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        on_step: OnStep | None = None,
    ) -> Picture:
        """Draw one picture.

        Args:
            mix: ``{adapter: strength}``, empty for the base; strengths -1 to 2.
            seed: 0 to 2^32 - 1; None draws one, which the report tells.
            steps, guidance: 1 to 100, and 0 to 30.
            on_step: told after each step; may raise to end the generation.

        Raises:
            SettingsError: a setting out of its range, an unknown adapter, or a prompt longer than the model reads.

        On any error no adapter stays active.
        """
        return self._draw(self._checked(prompt, mix, seed, steps, guidance), on_step)

    def compare(
        self,
        prompt: str,
        mix: Mapping[str, float],
        seed: int | None = None,
        steps: int = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[str, Picture]]:
        """Draw the base, each style of the mix alone and the mix, at one seed; yields each with its label.

        Args and Raises: as ``generate``; also SettingsError for an empty mix. All is checked before the first picture.
        ``on_step`` counts the steps of all pictures together.
        """
        settings = self._checked(prompt, mix, seed, steps, guidance)
        if not settings.mix:
            raise SettingsError("nothing to compare with the base: switch a style on first")
        return self._strip(settings, on_step)

    def _strip(self, settings: Settings, on_step: OnStep | None) -> Iterator[tuple[str, Picture]]:
        mixes = strip_of(settings.mix)
        for drawn, (label, mix) in enumerate(mixes.items()):
            each = Settings(settings.prompt, mix, settings.seed, settings.steps, settings.guidance)
            yield label, self._draw(each, _shifted(on_step, drawn * settings.steps, len(mixes) * settings.steps))

    def _checked(self, prompt: Any, mix: Any, seed: Any, steps: Any, guidance: Any) -> Settings:
        settings = Settings.checked(prompt, mix, seed, steps, guidance)
        known = [card.name for card in self.cards]
        unknown = [name for name in settings.mix if name not in known]
        if unknown:
            raise SettingsError(
                f"no style named {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, known)) or 'none'}"
            )
        tokenizer = self._pipe.tokenizer
        length = len(tokenizer(settings.prompt, truncation=False, verbose=False).input_ids)
        if length > tokenizer.model_max_length:
            raise SettingsError(
                f"the prompt is too long: the model reads {tokenizer.model_max_length} tokens, got {length}; shorten it"
            )
        return settings

    def _draw(self, settings: Settings, on_step: OnStep | None) -> Picture:
        resident = resident_of(self._pipe)
        with self._turn:
            start = self._now()
            with self._pipe.shira(list(settings.mix), list(settings.mix.values())):
                switched = self._now()
                entries, total = resident.changed()
                image = self._sample(settings, on_step)
                drawn = self._now()
        return Picture(
            image,
            {
                "model": self.model,
                "prompt": settings.prompt,
                "mix": dict(settings.mix),
                "seed": settings.seed,
                "steps": settings.steps,
                "guidance": settings.guidance,
                "switch_ms": round(1000 * (switched - start), 3),
                "entries_changed": entries,
                "share_changed": entries / total,
                "generation_s": round(drawn - switched, 3),
            },
        )

    def _sample(self, settings: Settings, on_step: OnStep | None) -> Image:
        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step:
                on_step(step + 1, settings.steps)
            return tensors

        output = self._pipe(
            settings.prompt,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=torch.Generator().manual_seed(settings.seed),
            callback_on_step_end=after_step,
        )
        image: Image = output.images[0]
        return image

    def _now(self) -> float:
        if self._pipe.device.type == "cuda":
            torch.cuda.synchronize()  # a switch on a GPU returns before it is done
        return time.perf_counter()


def strip_of(mix: Mapping[str, float]) -> dict[str, Mapping[str, float]]:
    """Label -> mix: the base, each style alone and, of several, the mix."""
    strip: dict[str, Mapping[str, float]] = {"base": {}}
    strip |= {f"{name} {strength:g}": {name: strength} for name, strength in mix.items()}
    if len(mix) > 1:
        strip["mix"] = mix
    return strip


def _shifted(on_step: OnStep | None, before: int, of: int) -> OnStep | None:
    return on_step and (lambda done, _: on_step(before + done, of))
