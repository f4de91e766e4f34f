"""A resident pipeline with a library of adapters, drawing one picture at a time. No Gradio in here."""

import copy
import reprlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL.Image import Image

from app.drawing.abilities import Abilities
from app.drawing.base_model import Dtype, load_pipeline
from app.drawing.fair_queue import BACKGROUND, FairQueue
from app.drawing.start_pictures import StartPictures
from app.drawing.suggestions import read_suggestions
from app.library.cards import Card
from app.library.library import Library
from app.library.uploads import DEFAULT_MAX_MB
from app.settings.checks import SettingsError
from app.settings.picture import Picture
from app.settings.settings import Settings
from app.settings.strengths import Mix, Strength, is_on, require_components
from shira_diffusers import ShiraError, __version__
from shira_diffusers.formats.paths import did_you_mean
from shira_diffusers.integrations.pipelines import resident_of

OnStep = Callable[[int, int], None]
"""``on_step(done, of)``, called with 0 when the turn has come and after each denoising step; an exception from it ends
the generation."""


class Session:
    """Draws pictures with any mix of the adapters of a library; safe to use from several threads.

    Between pictures no adapter is active. Pictures take turns, fairly between visits: each is byte for byte what the
    same settings give alone, whatever others draw meanwhile.

    Args:
        pipe: a text-to-image pipeline, on its device.
        model: its name, for reports.
        library: the adapters loaded into it.
        suggestions: prompts that it draws well.
        starts: the folder of pictures to start from; without it there can be none.
    """

    def __init__(
        self,
        pipe: Any,
        model: str,
        library: Library,
        suggestions: tuple[str, ...],
        starts: Path | None = None,
    ) -> None:
        self.model = model
        self.library = library
        self.suggestions = suggestions
        self.starts = StartPictures(starts)
        self.abilities = Abilities.of(pipe)
        self._pipe = pipe
        self.queue = FairQueue()  # shira() would wait too, but in no order, and waiting would count as switching
        self._pipe.set_progress_bar_config(disable=True)
        # a copy: a call changes how the tokenizer pads, also for the picture that is being drawn
        self._tokenizer = copy.deepcopy(getattr(pipe, "tokenizer", None))
        self._counting = threading.Lock()

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
            raise ShiraError(f"no folder of adapters at {adapters}; name one with --adapters{did_you_mean(adapters)}")
        pipe = load_pipeline(base, device, dtype)
        library = Library(pipe, adapters, data, max_upload_mb=max_upload_mb)
        starts = data / "starts" if data else None
        return cls(pipe, Path(base).name, library, read_suggestions(Path(base), adapters), starts)

    @property
    def cards(self) -> tuple[Card, ...]:
        """The loaded adapters, by name."""
        return self.library.cards

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(card.name for card in self.cards)

    @property
    def names_first(self) -> tuple[str, ...]:
        """Names of the adapters, styles before subjects: they show on any prompt and are mixed more often."""
        return tuple(card.name for card in sorted(self.cards, key=lambda card: "style" not in card.trigger))

    @property
    def renamed(self) -> dict[str, str]:
        """Names that loaded adapters had before they were renamed, with those that they have now."""
        return {before: card.name for card in self.cards for before in card.was}

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the loaded adapters' files, by name; empty while only the head of a file was read."""
        return {card.name: card.sha256 for card in self.cards}

    @property
    def pipe(self) -> Any:
        """The pipeline, to be looked at only: what draws with it or changes it takes turns in here."""
        return self._pipe

    @property
    def active(self) -> dict[str, Any]:
        """The adapters active now: none, but while a picture is drawn."""
        return resident_of(self._pipe).active

    def close(self) -> None:
        """As the app ends: the picture under way ends at its next step, and those that wait end at once."""
        self.queue.close()

    def generate(self, *given: Any, on_step: OnStep | None = None, visit: str = "", **named: Any) -> Picture:
        """Draw one picture when the visit's turn has come. On any error no adapter stays active.

        Args:
            given, named: the settings, as ``Settings.checked`` takes them.
            on_step: called after each step; may raise to end the generation.
            visit: who asks; visits take turns.

        Raises:
            SettingsError: as ``checked``.
        """
        return self.submit(self.checked(*given, **named), on_step, visit).result()

    def checked(self, *given: Any, **named: Any) -> Settings:
        """Settings that this session can draw, from untrusted values as ``Settings.checked`` takes them.

        Raises:
            SettingsError: as ``Settings.checked`` and ``drawable``.
        """
        return self.drawable(Settings.checked(*given, **named))

    def drawable(self, settings: Settings) -> Settings:
        """The settings, if this session can draw them.

        Raises:
            SettingsError: an unknown adapter or component, a prompt longer than the model reads, what the base does
                not allow, or a picture to start from that is not here.
        """
        self.require_known(settings.mix)
        require_components(settings.mix, {card.name: card.components for card in self.cards})
        for what, text in (("prompt", settings.prompt), ("negative prompt", settings.negative)):
            length, most = self.tokens(text)
            if length > most:
                raise SettingsError(f"the {what} is too long: the model reads {most} tokens, got {length}; shorten it")
        for problem, _ in self.problems(settings):
            raise SettingsError(problem)
        return settings

    def problems(self, settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
        """What cannot be had here, a sentence each, with the settings that do without."""
        yield from self.abilities.problems(settings)
        if settings.start_image and not self.starts.path(settings.start_image):
            yield "the picture to start from is not kept here, add it again", {"start_image": ""}

    def tokens(self, text: str) -> tuple[int, int]:
        """Tokens of a prompt, begin and end included, and how many the model reads; zeros where that is unknown."""
        if not self._tokenizer:
            return 0, 0
        with self._counting:
            length = len(self._tokenizer(text, truncation=False, verbose=False).input_ids)
        return length, self._tokenizer.model_max_length

    def require_known(self, mix: Mix) -> None:
        """Require that all styles of a mix are loaded.

        Raises:
            SettingsError: names those that are not, and those that there are.
        """
        known = self.adapter_names
        unknown = [name for name in mix if name not in known]
        if unknown:
            raise SettingsError(
                f"no style named {', '.join(map(reprlib.repr, unknown[:5]))}; "
                f"there are {', '.join(map(repr, known)) or 'none'}"
            )

    def submit(self, settings: Settings, on_step: OnStep | None = None, visit: str = "") -> Future[Picture]:
        """Draw a picture when the visit's turn has come; the settings are checked ones.

        Cancelling the future takes it out of the queue; once it has begun, only ``on_step`` and ``close`` can end it.
        """
        return self.queue.submit(visit, lambda: self.draw(settings, on_step))

    def draw(self, settings: Settings, on_step: OnStep | None = None) -> Picture:
        """Draw at once; for jobs that have their turn."""
        mix = {name: strength for name, strength in settings.mix.items() if is_on(strength)}
        if on_step:
            on_step(0, settings.steps_drawn)
        with self.library.using(mix):
            return self._draw(settings, mix, on_step)

    def look_at_all(self) -> None:
        """Read the adapters of which only the heads were read, one by one when nobody draws."""

        def look() -> None:
            if self.library.open_next():
                self.queue.submit(BACKGROUND, look)

        self.queue.submit(BACKGROUND, look)

    def _draw(self, settings: Settings, mix: dict[str, Strength], on_step: OnStep | None) -> Picture:
        resident = resident_of(self._pipe)
        start = self._now()
        with self._pipe.shira(list(mix), list(mix.values()), method=settings.method):
            switched = self._now()
            entries, total = resident.changed()
            hashes = self.hashes
            image = self._sample(settings, on_step)
            drawn = self._now()
        return Picture(
            image,
            {
                "model": self.model,
                **settings.as_dict(),
                "adapters": {name: {"strength": mix[name], "sha256": hashes.get(name, "")} for name in mix},
                "version": __version__,
                "switch_ms": round(1000 * (switched - start), 3),
                "entries_changed": entries,
                "share_changed": entries / total,
                "generation_s": round(drawn - switched, 3),
            },
        )

    def _sample(self, settings: Settings, on_step: OnStep | None) -> Image:
        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.queue.require_open()
            if on_step:
                on_step(step + 1, settings.steps_drawn)
            return tensors

        pipe, options = self._pipe, self.abilities.options(settings)
        if settings.start_image:
            pipe = self.abilities.image_to_image
            start = self.abilities.fitted(self.starts.read(settings.start_image), settings)
            options |= {"image": start, "strength": settings.change}
        output = pipe(
            settings.prompt,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=torch.Generator().manual_seed(settings.seed),
            callback_on_step_end=after_step,
            **options,
        )
        image: Image = output.images[0]
        return image

    def _now(self) -> float:
        if self._pipe.device.type != "cpu":
            torch.accelerator.synchronize(self._pipe.device)  # a switch on a GPU returns before it is done
        return time.perf_counter()


def series_of(settings: Settings) -> tuple[tuple[str, Settings], ...]:
    """What ``compare`` draws, with labels. Raises SettingsError: no adapter is on."""
    if not any(map(is_on, settings.mix.values())):
        raise SettingsError("nothing to compare with the base: switch a style on, at a strength other than 0")
    return tuple((label, replace(settings, mix=mix)) for label, mix in strip_of(settings.mix))


def strip_of(mix: Mix) -> tuple[tuple[str, Mix], ...]:
    """Labels and mixes: the base, each style alone and, of several, the mix; styles of strength 0 are left out."""
    strip: list[tuple[str, Mix]] = [("base", {})]
    strip += [(name, {name: strength}) for name, strength in mix.items() if is_on(strength)]
    return (*strip, ("mix", mix)) if len(strip) > 2 else tuple(strip)


def shifted(on_step: OnStep | None, before: int, of: int) -> OnStep | None:
    """``on_step`` that counts a picture's steps among those of several."""
    return on_step and (lambda done, _: on_step(before + done, of))
