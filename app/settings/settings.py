"""Define and check the settings that a picture is made from, before anything is drawn."""

import random
import reprlib
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


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a picture depends on, besides the model. Make one with ``checked``."""

    prompt: str
    mix: Mix
    seed: int
    steps: int
    guidance: float
    method: str = DEFAULT_METHOD

    @classmethod
    def checked(
        cls,
        prompt: Any = None,
        mix: Any = MappingProxyType({}),
        seed: Any = None,
        steps: Any = DEFAULT_STEPS,
        guidance: Any = DEFAULT_GUIDANCE,
        method: Any = DEFAULT_METHOD,
    ) -> Self:
        """Settings from untrusted values; of whole numbers, floats like 20.0 count as whole.

        Args:
            prompt: text that is not blank, of 2000 characters at most.
            mix: ``{adapter: strength}``, -1 to 2 each; a strength may be given by component, see ``Strength``.
            seed: 0 to 2^32 - 1; None draws one.
            steps: 1 to 100.
            guidance: 0 to 30.
            method: how several adapters are merged, a name in ``shira_diffusers.MERGE_METHODS``.

        Raises:
            SettingsError: names the first setting that is wrong, what was expected and what came.
        """
        return cls(
            _prompt(prompt),
            checked_mix(mix),
            random.SystemRandom().randint(0, MAX_SEED) if seed is None else whole("the seed", seed, 0, MAX_SEED),
            whole("steps", steps, 1, MAX_STEPS),
            number("guidance", guidance, 0, MAX_GUIDANCE),
            _method(method),
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON; ``checked`` takes them back."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"mix": dict(self.mix)}


def _prompt(prompt: object) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise SettingsError(f"the prompt must say what to draw, got {reprlib.repr(prompt)}")
    if len(prompt) > MAX_PROMPT:
        raise SettingsError(f"the prompt is too long: {MAX_PROMPT} characters at most, got {len(prompt)}; shorten it")
    if any(0xD800 <= ord(character) < 0xE000 for character in prompt):  # tokenizers take none
        raise SettingsError(f"the prompt holds half a character, got {reprlib.repr(prompt)}; type it again")
    return prompt.strip()


def _method(method: object) -> str:
    if not isinstance(method, str) or method not in MERGE_METHODS:
        raise SettingsError(f"the merge method must be one of {', '.join(MERGE_METHODS)}, got {reprlib.repr(method)}")
    return method
