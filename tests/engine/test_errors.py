"""Counts in messages."""

import pytest

from shira_diffusers.errors import counted, verb


@pytest.mark.parametrize(
    ("count", "noun", "of", "expected"),
    [
        (1, "weight", None, "1 weight"),
        (2, "weight", None, "2 weights"),
        (0, "entry", None, "0 entries"),
        (1, "entry", None, "1 entry"),
        (12345, "byte", None, "12,345 bytes"),
        (1, "parameter", 3, "1 of 3 parameters"),
        (1, "entry", 1, "1 of 1 entry"),
        (3, "key", 4000, "3 of 4,000 keys"),
    ],
)
def test_counts(count: int, noun: str, of: int | None, expected: str) -> None:
    assert counted(count, noun, of=of) == expected


def test_verbs() -> None:
    assert [verb(count, "is", "are") for count in (0, 1, 2)] == ["are", "is", "are"]
