"""Guess what a file that is no safetensors file is, by its first bytes, and what to do about it.

Downloads and clones that went wrong leave such files under the right name; the reader's own error says none of it.
"""

import re
from pathlib import Path
from typing import NamedTuple

_LOOKED_AT = 200  # bytes


class Guess(NamedTuple):
    """What a file seems to be, as the end of "it looks like ...", and the remedy."""

    kind: str
    remedy: str


_AGAIN = "download the file itself (on the Hub, from its address with /resolve/ in place of /blob/)"
_SAVED = "get the adapter as a .safetensors file"
_KINDS = (  # in this order: a regular expression of the first bytes, and the guess
    (
        rb"version https://git-lfs",
        Guess("a Git LFS pointer, in place of a file not downloaded yet", "run git lfs pull"),
    ),
    (rb"(?i)\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body)", Guess("an HTML page, such as an error page", _AGAIN)),
    (rb"(\xef\xbb\xbf)?\s*<\??[a-zA-Z]", Guess("an XML document, such as a server's error", _AGAIN)),
    (rb"PK", Guess("a pickle, which is never loaded (or another zip archive)", _SAVED)),
    (rb"\x80[\x02-\x05]", Guess("a pickle, which is never loaded", _SAVED)),
    (rb"\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", Guess("a compressed archive", "unpack it first")),
    (rb"GGUF", Guess("a GGUF model", _SAVED)),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", Guess("a picture", "name the adapter's file")),
    (rb"\x00\x05\x16[\x00\x07]", Guess("a side file that macOS made", "name the file without ._ in front")),
    (rb"\s*(\{\s*[\"}]|\[\s*[\"{\[\]])", Guess("JSON text, such as a server's answer", _AGAIN)),
)


def guess(file: Path) -> Guess | None:
    """What a file seems to be that could not be read as safetensors; None if that is not known: it may be damaged.

    Raises:
        OSError: it cannot be read.
    """
    with open(file, "rb") as raw:
        start = raw.read(_LOOKED_AT)
    if not start:
        return Guess("an empty file", "copy or download it again")
    return next((found for kind, found in _KINDS if re.match(kind, start, re.DOTALL)), None) or _text(start)


def _text(start: bytes) -> Guess | None:
    """Of a server's short answer in words, such as "Entry not found"."""
    line = start.decode("utf-8", "ignore").strip().partition("\n")[0].strip()
    if len(line) >= 4 and line.isprintable() and start.isascii() and b"\x00" not in start:
        return Guess(f"text that begins {line[:60]!r}", "get an intact .safetensors file")
    return None
