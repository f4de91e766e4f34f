"""What a picture is made from, checked before anything is drawn."""

import math
import random
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from shira_diffusers import ShiraError

MAX_STEPS = 100
MAX_GUIDANCE = 30.0
MIN_STRENGTH, MAX_STRENGTH = -1.0, 2.0
MAX_SEED = 2**32 - 1
MAX_PROMPT = 2000  # characters; the tokenizer, which is slow on long text, then counts tokens
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 3.0


class SettingsError(ShiraError):
    """A setting out of its range; nothing has been drawn."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a picture depends on, besides the model. Make one with ``checked``."""

    prompt: str
    mix: Mapping[str, float]
    seed: int
    steps: int
    guidance: float

    @classmethod
    def checked(cls, prompt: Any, mix: Any, seed: Any, steps: Any, guidance: Any) -> Self:
        """Settings from untrusted values; of whole numbers, floats like 20.0 count as whole.

        Args:
            prompt: text that is not blank, of 2000 characters at most.
            mix: ``{adapter: strength}``, -1 to 2 each.
            seed: 0 to 2^32 - 1; None draws one.
            steps: 1 to 100.
            guidance: 0 to 30.

        Raises:
            SettingsError: names the first setting that is wrong, what was expected and what came.
        """
        return cls(
            _prompt(prompt),
            _mix(mix),
            random.SystemRandom().randint(0, MAX_SEED) if seed is None else _whole("the seed", seed, 0, MAX_SEED),
            _whole("steps", steps, 1, MAX_STEPS),
            _number("guidance", guidance, 0, MAX_GUIDANCE),
        )


def _prompt(prompt: object) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise SettingsError(f"the prompt must say what to draw, got {reprlib.repr(prompt)}")
    if len(prompt) > MAX_PROMPT:
        raise SettingsError(f"the prompt is too long: {MAX_PROMPT} characters at most, got {len(prompt)}; shorten it")
    return prompt.strip()


def _mix(mix: object) -> dict[str, float]:
    if not isinstance(mix, Mapping):
        raise SettingsError(
            f'the mix must map each style to its strength, like {{"name": 1.0}}, got {reprlib.repr(mix)}'
        )
    nameless = [name for name in mix if not isinstance(name, str)]
    if nameless:
        raise SettingsError(f"the mix must name each style by text, got {reprlib.repr(nameless[0])}")
    return {
        name: _number(f"the strength of {reprlib.repr(name)}", mix[name], MIN_STRENGTH, MAX_STRENGTH)
        for name in sorted(mix)
    }


def _number(what: str, value: object, low: float, high: float) -> float:
    # a comparison with NaN is False
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise SettingsError(f"{what} must be a number from {low:g} to {high:g}, got {reprlib.repr(value)}")
    return float(value)


def _whole(what: str, value: object, low: int, high: int) -> int:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not low <= number <= high or number != int(number):
        raise SettingsError(f"{what} must be a whole number from {low} to {high}, got {reprlib.repr(value)}")
    return int(number)
