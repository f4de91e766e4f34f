"""Derive names of adapters from file names that strangers chose."""

import re
import unicodedata
from collections.abc import Container

MAX_LENGTH = 60  # characters of a name
MAX_BYTES = 150  # of it in UTF-8: file systems take 255, and the trash puts a number before it
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # not file names on Windows
_KEPT = " -_.+()"


def tidy_name(raw: object) -> str:
    """The name that an adapter gets from a file's name, the same each time; tidying twice changes nothing.

    The last part of a path, without ``.safetensors``; letters, marks and digits of any script, spaces and ``-_.+()``
    stay, all else becomes a dash; look-alikes of characters (full width, ligatures) become the plain ones. Never empty,
    never a path, at most 60 characters, no name that Windows reserves.
    """
    name = unicodedata.normalize("NFKC", str(raw)[:4096])
    name = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    name = re.sub(r"\.safetensors\s*$", "", name, flags=re.IGNORECASE)
    name = "".join(_plain(character) for character in name)
    name = re.sub(r"\s+", " ", re.sub(r"-{2,}", "-", name))
    name = _trimmed(name)
    if not any(character.isalnum() for character in name):
        return "adapter"
    return f"adapter-{name}"[:MAX_LENGTH] if _DEVICES.fullmatch(name) else name


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


def _plain(character: str) -> str:
    kind = unicodedata.category(character)
    if kind[0] in "LMN" or character in _KEPT:
        return character
    if kind in ("Cf", "Cn", "Cs"):  # invisible, such as the one that turns text around; half a pair
        return ""
    return " " if kind == "Zs" else "-"


def _trimmed(name: str, length: int = MAX_LENGTH) -> str:
    name = name[:length].encode()[:MAX_BYTES].decode(errors="ignore")
    return name.strip(" .-_+")
