"""What the benchmarks change in their process is undone after each test."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def loud_libraries() -> Iterator[None]:
    """`benchmarks.measure.Run` silences diffusers, whose warnings other tests of the process look for."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    yield
    logger.setLevel(level)
