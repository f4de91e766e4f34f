"""What should be reached, and whether it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.report import cells
from benchmarks.report.results import Figures, Read
from benchmarks.report.tables import markdown


@dataclass(frozen=True)
class Bar:
    """One aim.

    Args:
        what: the figure that is aimed at, with model, device and setting.
        better: whether more or less of it is better.
        aim: the least, or the most, that reaches it; compared after rounding to ``digits``.
        unit: appended to figures: " ms", "x", ...
        read: how the figure is read from the results.
        missed: why, told where the aim is missed; ``{limit}`` in it stands for the figure of ``limit_ms``.
        over_limit: how often the time that memory bandwidth allows went by, if that is what bounds the figure.
        limit_ms: the time that memory bandwidth allows, in milliseconds.
        digits: decimals that count.
        fixed: whether all of them are shown.
    """

    what: str
    better: Literal["more", "less"]
    aim: float
    unit: str
    read: Read
    missed: str
    over_limit: Read | None = None
    limit_ms: Read | None = None
    digits: int = 3
    fixed: bool = False

    def met(self, figures: Figures) -> bool | None:
        """None where nothing was measured."""
        measured = self.read(figures)
        if measured is None:
            return None
        rounded = round(measured, self.digits)
        return rounded >= self.aim if self.better == "more" else rounded <= self.aim

    def measured(self, figures: Figures) -> str:
        found = self.read(figures)
        return "not measured" if found is None else self.text(found)

    def text(self, figure: float) -> str:
        shown = f"{figure:.{self.digits}f}" if self.fixed else cells.short(round(figure, self.digits))
        return f"{shown}{self.unit}"

    def why(self, figures: Figures) -> str:
        least = self.limit_ms(figures) if self.limit_ms else None
        return self.missed.replace("{limit}", "not measured" if least is None else f"{cells.short(least)} ms")

    @property
    def aimed(self) -> str:
        return f"at {'least' if self.better == 'more' else 'most'} {self.text(self.aim)}" if self.aim else "none"

    def limit(self, figures: Figures) -> str:
        found = self.over_limit(figures) if self.over_limit else None
        return "" if found is None else cells.times(round(found, 1))


def bar_table(bars: Sequence[Bar], figures: Figures) -> str:
    verdicts = {True: "yes", False: "**no**", None: ""}
    columns = {
        "Aim": [bar.what for bar in bars],
        "Should be": [bar.aimed for bar in bars],
        "Is": [bar.measured(figures) for bar in bars],
        "Reached": [verdicts[bar.met(figures)] for bar in bars],
        "Time over the limit of memory": [bar.limit(figures) for bar in bars],
    }
    return markdown({heading: texts for heading, texts in columns.items() if any(texts)})


def reasons(bars: Sequence[Bar], figures: Figures) -> Iterator[str]:
    """Why, for each that is missed; one line for bars of the same reason."""
    told: dict[str, list[str]] = {}
    for bar in bars:
        if bar.met(figures) is False:
            told.setdefault(bar.why(figures), []).append(bar.what)
    for reason, names in told.items():
        yield f"Not reached: {'; '.join(names)}. {reason}"


def counted(bars: Sequence[Bar], figures: Figures) -> str:
    """How many are reached, in words."""
    met = [bar.met(figures) for bar in bars]
    text = f"{met.count(True)} of {len(met)} aims are reached, {met.count(False)} are not"
    return f"{text}, {met.count(None)} were not measured." if None in met else f"{text}."
