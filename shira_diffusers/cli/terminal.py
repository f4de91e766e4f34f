"""Write text to a terminal, safely whatever an untrusted file contains."""

import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO


def say(text: str) -> None:
    """Write a line to stdout: a result."""
    _write(sys.stdout, text)


def say_json(value: Any) -> None:
    """Write a result to stdout as JSON."""
    say(json.dumps(value, indent=2))


def note(text: str) -> None:
    """Write a line to stderr: progress, a remark or an error."""
    _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")  # an ASCII terminal gets escapes
    stream.flush()


def printable(text: str) -> str:
    """The text with line breaks and control characters as escapes: a file's metadata cannot steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(error: BaseException) -> str:
    """An error's message with its listing on the same line, offenders separated by semicolons."""
    message = str(error) or type(error).__name__
    return printable(" ".join(message.replace(":\n  - ", ": ").replace("\n  - ", "; ").split()))


def table(rows: Sequence[Sequence[str]], right: tuple[int, ...] = ()) -> list[str]:
    """Rows of cells as lines with aligned columns; the columns in ``right`` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if k in right else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
