"""Compute how many steps a preview can take here within a second, switch and transport included."""

SECONDS = 0.55  # to draw; the way to the browser and back takes the rest
MOST, LEAST = 6, 3  # steps


class PreviewBudget:
    """Follows how fast previews are drawn: fewer steps where the machine is slow or busy."""

    def __init__(self) -> None:
        self._a_step = 0.0  # seconds; 0 while nothing is known

    def steps(self, wanted: int) -> int:
        """Steps of the next preview of a picture of ``wanted`` ones."""
        fit = int(SECONDS / self._a_step) if self._a_step else MOST
        return min(wanted, max(LEAST, min(MOST, fit)))

    def drew(self, steps: int, seconds: float) -> None:
        """Tell what a preview took."""
        now = seconds / steps
        self._a_step = (self._a_step + now) / 2 if self._a_step else now
