"""Settings of a picture, preset or link brought back to a session that may have other adapters by now."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.session import Session
from app.settings import DEFAULT_GUIDANCE, DEFAULT_METHOD, DEFAULT_STEPS, Settings

SETTINGS = ("prompt", "mix", "seed", "steps", "guidance", "method")


@dataclass(frozen=True, slots=True)
class Restored:
    """Settings that can be drawn, and what is different from then, a sentence each."""

    settings: Settings
    notes: tuple[str, ...]


def restore(given: Mapping[str, Any], session: Session) -> Restored:
    """Check settings from outside; adapters that are missing are left out of the mix and told.

    Args:
        given: prompt, mix, seed, steps, guidance, method; and, in a picture's metadata, model and adapters with
            hashes. All but the prompt have defaults.

    Raises:
        SettingsError: a setting out of its range.
    """
    settings = Settings.checked(
        given.get("prompt"),
        given.get("mix", {}),
        given.get("seed"),
        given.get("steps", DEFAULT_STEPS),
        given.get("guidance", DEFAULT_GUIDANCE),
        given.get("method", DEFAULT_METHOD),
    )
    hashes = {card.name: card.sha256 for card in session.cards}
    mix = {name: strength for name, strength in settings.mix.items() if name in hashes}
    kept = session.checked(settings.prompt, mix, settings.seed, settings.steps, settings.guidance, settings.method)
    return Restored(kept, (*_missing(settings, hashes), *_changed(given, mix, hashes), *_model(given, session)))


def as_dict(settings: Settings) -> dict[str, Any]:
    """Settings as plain data for JSON, which ``restore`` takes back."""
    return {name: getattr(settings, name) for name in SETTINGS} | {"mix": dict(settings.mix)}


def _missing(settings: Settings, hashes: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(
        f"“{name[:80]}” is not among the styles here, so it was left out of the mix."
        for name in settings.mix
        if name not in hashes
    )


def _changed(given: Mapping[str, Any], mix: Mapping[str, Any], hashes: Mapping[str, str]) -> tuple[str, ...]:
    told = given.get("adapters")
    if not isinstance(told, Mapping):
        return ()
    then = {name: told[name].get("sha256") for name in mix if isinstance(told.get(name), Mapping)}
    return tuple(
        f"“{name}” is another file by now than when the picture was drawn, so it may look different."
        for name, sha256 in then.items()
        if sha256 and hashes[name] and sha256 != hashes[name]  # unknown while only the head of a file was read
    )


def _model(given: Mapping[str, Any], session: Session) -> tuple[str, ...]:
    model = given.get("model")
    if not isinstance(model, str) or not model or model == session.model:
        return ()
    return (f"It was drawn with another model, “{model[:80]}”; this is “{session.model}”.",)
