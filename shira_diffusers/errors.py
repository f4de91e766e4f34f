"""The errors of the library: one base class and three leaves.

Every message names the offender, what was expected, what came and what to do. Wherever one of these is
raised, nothing has been changed.
"""

from collections.abc import Sequence

_SHOWN = 8


class ShiraError(ValueError):
    """Base of all errors of this library; a ``ValueError``, as diffusers raises for bad adapters."""


class AdapterFormatError(ShiraError):
    """A file, folder, state dict or tensor that is not a valid adapter."""


class AdapterMismatchError(ShiraError):
    """A valid adapter that does not fit the model it is meant for."""


class ResidentStateError(ShiraError):
    """A resident model in a state in which its weights cannot be overwritten or restored safely."""


def listing(offenders: Sequence[str], shown: int = _SHOWN) -> str:
    """Join offenders for a message, one a line; past ``shown`` the rest is counted."""
    lines = [f"\n  - {offender}" for offender in offenders[:shown]]
    if len(offenders) > shown:
        lines.append(f"\n  - ... and {len(offenders) - shown} more")
    return "".join(lines)


def counted(count: int, noun: str, *, of: int | None = None) -> str:
    """A count with its noun: ``1 weight``, ``2,000 weights``, ``1 of 3 entries``."""
    many = f"{noun[:-1]}ies" if noun[-1] == "y" and noun[-2] not in "aeiou" else f"{noun}s"
    total = count if of is None else of
    return f"{count:,}{'' if of is None else f' of {of:,}'} {noun if total == 1 else many}"


def verb(count: int, one: str, many: str) -> str:
    """The form of a verb that agrees with a count: ``was`` or ``were``."""
    return one if count == 1 else many
