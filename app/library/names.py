"""Derive names of adapters from file names that strangers chose. In what they type, slashes become dashes."""

import re
import unicodedata
from collections.abc import Container

MAX_LENGTH = 60  # characters of a name
MAX_BYTES = 150  # of it in UTF-8: file systems take 255, and the trash puts a number before it
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # not file names on Windows
_KEPT = frozenset(" !#$%&'()+,-.;=@[]^_{}")  # of ASCII, beside letters and digits
_SYMBOLS = ("So", "Sc", "Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps")  # of the rest: emoji, currencies, punctuation
_PATH = re.compile(r"(~|\.\.?|[a-z]:)?[/\\]|.*\.safetensors\s*$", re.IGNORECASE | re.DOTALL)  # how one begins or ends
_JOINER = "\u200d"  # between two emoji that are one


def tidy_name(raw: object) -> str:
    """The name that an adapter gets from a file's name, the same each time; tidying twice changes nothing.

    The last part of a path, without ``.safetensors``; letters, marks and digits of any script, emoji, spaces and
    punctuation stay; what some file system refuses (``<>:"|?*~``) and mathematical symbols become a dash; look-alikes
    of characters (full width, ligatures) become the plain ones. Never empty, never a path, at most 60 characters, no
    name that Windows reserves.
    """
    name = unicodedata.normalize("NFKC", str(raw)[:4096])
    name = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    name = re.sub(r"\.safetensors\s*$", "", name, flags=re.IGNORECASE)
    name = "".join(map(_plain, " " + name, name, name[1:] + " "))
    name = re.sub(r"\s+", " ", re.sub(r"-{2,}", "-", name))
    name = _trimmed(name)
    if not any(character.isalnum() or _is_emoji(character) for character in name):
        return "adapter"
    return f"adapter-{name}"[:MAX_LENGTH] if _DEVICES.fullmatch(name) else name


def typed_name(raw: object) -> str:
    """The name that somebody typed, tidied: slashes become dashes, as in ``AC-DC``; of a path, the last part stays."""
    name = unicodedata.normalize("NFKC", str(raw)[:4096])
    return tidy_name(name if _PATH.match(name.strip()) else re.sub(r"[/\\]", "-", name))


def free_name(wanted: str, taken: Container[str]) -> str:
    """``wanted``, or with the first number that makes it new, ``wanted-2`` and so on.

    Args:
        taken: names by ``key_of``.
    """
    name, number = wanted, 1
    while key_of(name) in taken:
        number += 1
        name = f"{_trimmed(wanted, MAX_LENGTH - 5)}-{number}"
    return name


def key_of(name: str) -> str:
    """What two names share that some file system takes for one."""
    return unicodedata.normalize("NFKC", name).casefold()


def _plain(before: str, character: str, after: str) -> str:
    kind = unicodedata.category(character)
    if character.isascii():
        return character if character.isalnum() or character in _KEPT else "-"
    if kind[0] in "LMN" or kind in _SYMBOLS or _is_emoji(character):
        return character
    if character == _JOINER and (_is_emoji(before) or before == "\ufe0f") and _is_emoji(after):
        return character
    if kind in ("Cf", "Cn", "Cs"):  # invisible, such as the one that turns text around; half a pair
        return ""
    return " " if kind == "Zs" else "-"


def _is_emoji(character: str) -> bool:
    return unicodedata.category(character) == "So" or "\U0001f3fb" <= character <= "\U0001f3ff"  # or a skin's tone


def _trimmed(name: str, length: int = MAX_LENGTH) -> str:
    name = name[:length].encode()[:MAX_BYTES].decode(errors="ignore")
    return name.strip(f" .-_+{_JOINER}")
