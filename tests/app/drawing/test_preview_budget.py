"""Previews have as many steps as come within a second."""

import pytest

from app.drawing.preview_budget import LEAST, MOST, PreviewBudget


@pytest.mark.parametrize(("seconds", "steps"), [(0.01, MOST), (0.1, 5), (0.13, 4), (0.5, LEAST), (60.0, LEAST)])
def test_steps_follow_the_speed(seconds: float, steps: int) -> None:
    budget = PreviewBudget()
    assert budget.steps(20) == MOST and budget.steps(2) == 2
    for _ in range(8):
        budget.drew(4, 4 * seconds)
    assert budget.steps(20) == steps and budget.steps(1) == 1


def test_one_slow_preview_counts_for_half() -> None:
    budget = PreviewBudget()
    budget.drew(6, 0.3)
    budget.drew(6, 0.9)
    assert budget.steps(20) == 5
