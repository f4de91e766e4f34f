"""A resident pipeline with a library of adapters, drawing one picture at a time. No Gradio in here."""

import reprlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from PIL.Image import Image

from app.cards import Card
from app.library import Library
from app.loading import Dtype, load_pipeline
from app.picture import Picture
from app.settings import DEFAULT_GUIDANCE, DEFAULT_STEPS, Settings, SettingsError
from app.suggestions import read_suggestions
from app.uploads import DEFAULT_MAX_MB
from shira_diffusers import ShiraError
from shira_diffusers.pipeline import resident_of

OnStep = Callable[[int, int], None]
"""``on_step(done, of)``, called with 0 when the turn has come and after each denoising step; an exception from it ends
the generation."""


class Session:
    """Draws pictures with any mix of the adapters of a library; safe to use from several threads.

    Between pictures no adapter is active. Pictures take turns: each is byte for byte what the same settings give
    alone, whatever others draw meanwhile.

    Args:
        pipe: a text-to-image pipeline, on its device.
        model: its name, for reports.
        library: the adapters loaded into it.
        suggestions: prompts that it draws well.
    """

    def __init__(self, pipe: Any, model: str, library: Library, suggestions: tuple[str, ...]) -> None:
        self.model = model
        self.library = library
        self.suggestions = suggestions
        self._pipe = pipe
        self._turn = threading.Lock()  # shira() would wait too, but then waiting would count as switching
        self._pipe.set_progress_bar_config(disable=True)

    @classmethod
    def open(
        cls,
        base: str,
        adapters: Path,
        data: Path | None = None,
        *,
        device: str = "cpu",
        dtype: Dtype = "float32",
        max_upload_mb: float = DEFAULT_MAX_MB,
    ) -> Self:
        """Load a pipeline and all adapters of a folder.

        Args:
            base: a folder, or a Hub id.
            adapters: files that do not fit are listed in ``library.refused``.
            data: the app's folder, for adapters that are added; without it none can be.
            max_upload_mb: of a file that is added.
            device: as torch names it.
            dtype: of the weights.

        Raises:
            ShiraError: there is no such folder, no pipeline in it, or no such device.
        """
        if not adapters.is_dir():
            raise ShiraError(f"no folder of adapters at {adapters}; name one with --adapters")
        pipe = load_pipeline(base, device, dtype)
        library = Library(pipe, adapters, data, max_upload_mb=max_upload_mb)
        return cls(pipe, Path(base).name, library, read_suggestions(Path(base), adapters))

    @property
    def cards(self) -> tuple[Card, ...]:
        """The loaded adapters, by name."""
        return self.library.cards

    @property
    def pipe(self) -> Any:
        """The pipeline, to be looked at only: what draws with it or changes it takes turns in here."""
        return self._pipe

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
            on_step: told of each step; may raise to end the generation.

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
        if not any(settings.mix.values()):
            raise SettingsError("nothing to compare with the base: switch a style on, at a strength other than 0")
        return self._strip(settings, on_step)

    def _strip(self, settings: Settings, on_step: OnStep | None) -> Iterator[tuple[str, Picture]]:
        mixes = strip_of(settings.mix)
        for drawn, (label, mix) in enumerate(mixes):
            each = Settings(settings.prompt, mix, settings.seed, settings.steps, settings.guidance)
            yield label, self._draw(each, _shifted(on_step, drawn * settings.steps, len(mixes) * settings.steps))

    def _checked(self, prompt: Any, mix: Any, seed: Any, steps: Any, guidance: Any) -> Settings:
        settings = Settings.checked(prompt, mix, seed, steps, guidance)
        known = [card.name for card in self.cards]
        unknown = [name for name in settings.mix if name not in known]
        if unknown:
            raise SettingsError(
                f"no style named {', '.join(map(reprlib.repr, unknown[:5]))}; "
                f"there are {', '.join(map(repr, known)) or 'none'}"
            )
        tokenizer = getattr(self._pipe, "tokenizer", None)
        length = len(tokenizer(settings.prompt, truncation=False, verbose=False).input_ids) if tokenizer else 0
        if tokenizer and length > tokenizer.model_max_length:
            raise SettingsError(
                f"the prompt is too long: the model reads {tokenizer.model_max_length} tokens, got {length}; shorten it"
            )
        return settings

    def _draw(self, settings: Settings, on_step: OnStep | None) -> Picture:
        resident = resident_of(self._pipe)
        mix = {name: strength for name, strength in settings.mix.items() if strength}  # 0 is the base
        with self._turn:
            if on_step:
                on_step(0, settings.steps)
            start = self._now()
            with self._pipe.shira(list(mix), list(mix.values())):
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


def strip_of(mix: Mapping[str, float]) -> tuple[tuple[str, Mapping[str, float]], ...]:
    """Labels and mixes: the base, each style alone and, of several, the mix; styles of strength 0 are left out."""
    strip: list[tuple[str, Mapping[str, float]]] = [("base", {})]
    strip += [(name, {name: strength}) for name, strength in mix.items() if strength]
    return (*strip, ("mix", mix)) if len(strip) > 2 else tuple(strip)


def _shifted(on_step: OnStep | None, before: int, of: int) -> OnStep | None:
    return on_step and (lambda done, _: on_step(before + done, of))
