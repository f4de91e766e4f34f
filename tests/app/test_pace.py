"""Previews have as many steps as come within a second."""

import pytest

from app.drawing.preview_budget import LEAST, MOST, Pace


@pytest.mark.parametrize(("seconds", "steps"), [(0.01, MOST), (0.1, 5), (0.13, 4), (0.5, LEAST), (60.0, LEAST)])
def test_steps_follow_the_speed(seconds: float, steps: int) -> None:
    pace = Pace()
    assert pace.steps(20) == MOST and pace.steps(2) == 2
    for _ in range(8):
        pace.drew(4, 4 * seconds)
    assert pace.steps(20) == steps and pace.steps(1) == 1


def test_one_slow_preview_counts_for_half() -> None:
    pace = Pace()
    pace.drew(6, 0.3)
    pace.drew(6, 0.9)
    assert pace.steps(20) == 5
