"""Restore the settings of a picture, preset or link in a session that may have other adapters now."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from app.drawing.session import Session
from app.settings.settings import Settings


@dataclass(frozen=True, slots=True)
class Restored:
    """Settings that can be drawn, and what is different from then, a sentence each.

    Args:
        settings: without the adapters that are missing here.
        then: with them, under the names that the others have now.
    """

    settings: Settings
    then: Settings
    notes: tuple[str, ...]


def restore(given: Mapping[str, Any], session: Session) -> Restored:
    """Check settings from outside, with a note of each difference: renamed adapters are found by their hash, or where
    none is given by the name that they had; missing ones are left out of the mix, and what this base does not allow out
    of the settings.

    Args:
        given: the fields of ``Settings``; and, in a picture's metadata, model and adapters with hashes. All but the
            prompt have defaults: pictures and presets of earlier versions lack some.

    Raises:
        SettingsError: a setting out of its range.
    """
    settings = Settings.checked(**{each.name: given[each.name] for each in fields(Settings) if each.name in given})
    hashes = session.hashes
    then = _hashes_of(given)
    named = _names_now(settings.mix, then, hashes, session.renamed)
    mix = {now: settings.mix[name] for name, now in named.items()}
    mixed = replace(settings, mix=mix)
    lacking = tuple(session.problems(mixed))
    kept = session.drawable(replace(mixed, **{what: value for _, each in lacking for what, value in each.items()}))
    notes = (note for name in settings.mix if (note := _note(name, named.get(name), then.get(name, ""), hashes)))
    without = (f"{problem[0].upper()}{problem[1:]}; this was left out." for problem, _ in lacking)
    then_named = replace(settings, mix={named.get(name, name): mix for name, mix in settings.mix.items()})
    return Restored(kept, then_named, (*notes, *without, *_model(given, session)))


def left_out(style: str) -> str:
    """The note of a style that is missing."""
    return f"“{style[:80]}” is not among the styles here, so it was left out of the mix."


def to_keep(settings: Settings, session: Session) -> dict[str, Any]:
    """Settings for JSON with the adapters' hashes, by which ``restore`` finds those that were renamed."""
    hashes = session.hashes
    return settings.as_dict() | {"adapters": {name: {"sha256": hashes.get(name, "")} for name in settings.mix}}


def _hashes_of(given: Mapping[str, Any]) -> dict[str, str]:
    """The hashes in untrusted settings, by name."""
    adapters = given.get("adapters")
    pairs = adapters.items() if isinstance(adapters, Mapping) else ()
    hashes = {name: value.get("sha256") for name, value in pairs if isinstance(value, Mapping)}
    return {name: sha256 for name, sha256 in hashes.items() if isinstance(sha256, str) and sha256}


def _names_now(
    mix: Mapping[str, Any], then: Mapping[str, str], hashes: Mapping[str, str], renamed: Mapping[str, str]
) -> dict[str, str]:
    """What the adapters of a mix are called now, without those that are missing."""
    by_hash = {sha256: name for name, sha256 in reversed(list(hashes.items())) if sha256}
    named: dict[str, str] = {}
    for name in sorted(mix, key=lambda each: each not in hashes):
        same = name in hashes and then.get(name, hashes[name]) == hashes[name]
        found = by_hash.get(then[name]) if name in then else renamed.get(name)
        now = name if same or found is None else found
        if now in hashes and now not in named.values():
            named[name] = now
    return {name: named[name] for name in mix if name in named}


def _note(name: str, now: str | None, then: str, hashes: Mapping[str, str]) -> str:
    if now is None:
        return left_out(name)
    if now != name:
        return f"“{name[:80]}” is called “{now}” here."
    if then and hashes[now] and then != hashes[now]:  # unknown while only the head of a file was read
        return f"“{name}” is a different file now, so it may look different."
    return ""


def _model(given: Mapping[str, Any], session: Session) -> tuple[str, ...]:
    model = given.get("model")
    if not isinstance(model, str) or not model or model == session.model:
        return ()
    return (f"It was drawn with another model, “{model[:80]}”; this is “{session.model}”.",)
