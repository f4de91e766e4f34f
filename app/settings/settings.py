"""Define and check the settings that a picture is made from, before anything is drawn."""

import difflib
import random
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Self

from app.settings.checks import SettingsError, number, whole
from app.settings.strengths import Mix, checked_mix
from shira_diffusers.adapters.merge import MERGE_METHODS

MAX_STEPS = 100
MAX_GUIDANCE = 30.0
MAX_SEED = 2**32 - 1
MAX_PROMPT = 2000  # characters; the tokenizer, which is slow on long text, then counts tokens
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 3.0
DEFAULT_METHOD = "sum"
DEFAULT_CHANGE = 0.6
DEFAULT_NEGATIVE_MIX = 1.0
MAX_SIDE = 4096  # pixels; what a model can draw is less, see `Abilities`
RANDOM_SEED = -1
_SHA256 = re.compile("[0-9a-f]{64}")
_SIZE = re.compile(r"\s*(\d{1,5})\s*[x×,*]\s*(\d{1,5})\s*", re.IGNORECASE)  # noqa: RUF001


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a picture depends on, besides the model. Make one with ``checked``."""

    prompt: str
    mix: Mix
    seed: int
    steps: int
    guidance: float
    method: str = DEFAULT_METHOD
    negative: str = ""
    width: int = 0
    height: int = 0
    start_image: str = ""
    change: float = DEFAULT_CHANGE
    negative_mix: float = DEFAULT_NEGATIVE_MIX

    @classmethod
    def checked(
        cls,
        prompt: Any = None,
        mix: Any = MappingProxyType({}),
        seed: Any = None,
        steps: Any = DEFAULT_STEPS,
        guidance: Any = DEFAULT_GUIDANCE,
        method: Any = DEFAULT_METHOD,
        negative: Any = "",
        width: Any = 0,
        height: Any = 0,
        start_image: Any = "",
        change: Any = DEFAULT_CHANGE,
        negative_mix: Any = DEFAULT_NEGATIVE_MIX,
    ) -> Self:
        """Settings from untrusted values; of whole numbers, floats like 20.0 count as whole.

        Args:
            prompt: text that is not blank, of 2000 characters at most.
            mix: ``{adapter: strength}``, -1 to 2 each; a strength may be given by component, see ``Strength``.
            seed: 0 to 2^32 - 1; -1 or None draws one.
            steps: 1 to 100.
            guidance: 0 to 30.
            method: how several adapters are merged, a name in ``shira_diffusers.MERGE_METHODS``.
            negative: what is not wanted, of 2000 characters at most; None or blank is nothing.
            width, height: in pixels, up to 4096; 0 or None is the model's own.
            start_image: SHA-256 of a picture in ``StartPictures`` to start from; None or empty starts from noise.
            change: 0.01 to 1, how much of the picture to start from is drawn anew.
            negative_mix: 0 to 1, the part of the mix in guidance's negative half; 1 is as usual, and at 0.5 guidance
                drives the styles too.

        Raises:
            SettingsError: names the first setting that is wrong, what was expected and what came.
        """
        settings = cls(
            _prompt(prompt),
            checked_mix(mix),
            checked_seed(seed),
            whole("steps", steps, 1, MAX_STEPS),
            number("guidance", guidance, 0, MAX_GUIDANCE),
            _method(method),
            _text("negative prompt", "" if negative is None else negative),
            whole("the width", width or 0, 0, MAX_SIDE),
            whole("the height", height or 0, 0, MAX_SIDE),
            _start_image(start_image or ""),
            number("the change", change, 0.01, 1),
            number("the part of the mix in the negative half", negative_mix, 0, 1),
        )
        if not settings.steps_drawn:
            raise SettingsError(f"a change of {settings.change:g} needs more steps, got {settings.steps}; raise either")
        return settings

    @property
    def steps_drawn(self) -> int:
        """Denoising steps: from a picture, only those that are left to change it."""
        return int(self.steps * self.change) if self.start_image else self.steps

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON; ``checked`` takes them back."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"mix": dict(self.mix)}


def require_settings(given: Iterable[object], beside: Iterable[str] = ()) -> None:
    """Require that names are those of settings, or are ``beside`` them.

    Raises:
        SettingsError: the first that are not, the settings that there are, and those that are most like them.
    """
    names = [each.name for each in fields(Settings)]
    unknown = sorted(map(str, {*given} - {*names, *beside}))[:5]
    if unknown:
        alike = dict.fromkeys(near for each in unknown for near in difflib.get_close_matches(each[:80], names, 1))
        meant = f"; did you mean {' and '.join(alike)}?" if alike else ""
        told = ", ".join(map(reprlib.repr, unknown))
        raise SettingsError(f"no setting named {told}; there are {', '.join(names)}{meant}")


def checked_seed(seed: object) -> int:
    """A seed from an untrusted value; -1 or None draws one. Raises SettingsError: none from 0 to 2^32 - 1."""
    if seed is None or (seed == RANDOM_SEED and not isinstance(seed, bool)):
        return random.SystemRandom().randint(0, MAX_SEED)
    return whole("the seed", seed, 0, MAX_SEED, f", or {RANDOM_SEED} to draw one")


def size_of(text: object) -> tuple[int, int]:
    """Width and height from text like "128 x 192"; blank text is (0, 0), the model's own.

    Raises:
        SettingsError: it is no size.
    """
    if text is None or (isinstance(text, str) and not text.strip()):
        return 0, 0
    found = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if not found:
        raise SettingsError(f"the size must be like 128 x 192, got {reprlib.repr(text)}")
    return int(found[1]), int(found[2])


def _prompt(prompt: object) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise SettingsError(f"the prompt must say what to draw, got {reprlib.repr(prompt)}")
    return _text("prompt", prompt)


def _text(what: str, text: object) -> str:
    if not isinstance(text, str):
        raise SettingsError(f"the {what} must be text, got {reprlib.repr(text)}")
    if len(text) > MAX_PROMPT:
        raise SettingsError(f"the {what} is too long: {MAX_PROMPT} characters at most, got {len(text)}; shorten it")
    if any(0xD800 <= ord(character) < 0xE000 for character in text):  # tokenizers take none
        raise SettingsError(f"the {what} holds half a character, got {reprlib.repr(text)}; type it again")
    return text.strip()


def _start_image(sha256: object) -> str:
    if not isinstance(sha256, str) or (sha256 and not _SHA256.fullmatch(sha256)):
        raise SettingsError(f"the picture to start from must be named by its SHA-256, got {reprlib.repr(sha256)}")
    return sha256


def _method(method: object) -> str:
    if not isinstance(method, str) or method not in MERGE_METHODS:
        raise SettingsError(f"the merge method must be one of {', '.join(MERGE_METHODS)}, got {reprlib.repr(method)}")
    return method
