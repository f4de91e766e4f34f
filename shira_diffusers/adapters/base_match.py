"""Tell by a few values of the base whether a model is the one that an adapter was trained on. NumPy only."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

BaseMatch = Literal["same", "sibling", "other"]

ROUNDING = 2.0**-10
"""The largest relative difference of a float16 probe and the value it was taken from."""

UNDERFLOW = 2.0**-23
"""The largest difference by underflow: subnormals of float16."""

_SIBLING_SIMILARITY = 0.8  # cosine: fine-tunes of one model stay near 1, unrelated models near 0


def match(expected: NDArray[np.float64], got: NDArray[np.float64], allowed: NDArray[np.float64]) -> BaseMatch:
    """Compare probes with a model's values at the same entries.

    Args:
        expected: the probes, ``(n,)``.
        got: the model's values, ``(n,)``.
        allowed: the difference that rounding explains, ``(n,)``.

    Returns:
        See ``base_probes.match_base``.
    """
    # a few values may be rounded otherwise, as by a cast through a third dtype
    if int((np.abs(expected - got) <= allowed).sum()) >= 0.99 * len(expected):
        return "same"
    norm = float(np.linalg.norm(expected) * np.linalg.norm(got))
    return "sibling" if norm and float(expected @ got) / norm >= _SIBLING_SIMILARITY else "other"


def trained_on(metadata: Mapping[str, str]) -> str:
    """A clause for messages that names an adapter's base, where its metadata does."""
    base = metadata.get("base_model")
    return f"; it was trained on {base!r}" if base else ""


def other_base(name: str, metadata: Mapping[str, str]) -> str:
    """What to warn of where the base is another one."""
    return (
        f"adapter {name!r} fits by shape but was trained on another model than this one{trained_on(metadata)}; "
        "expect poor pictures"
    )
