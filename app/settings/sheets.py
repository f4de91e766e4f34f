"""Pictures that belong together as a table: what each is made from, and how rows and columns are labelled."""

from dataclasses import dataclass

from app.settings.settings import Settings
from app.settings.strengths import is_on, strength_text

MAX_PICTURES = 100


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table per label of z, with a row per label of y and a column per label of x.

    Args:
        columns, rows, tables: labels of x, y and z; empty where there is nothing to tell apart.
        cells: label and settings of each picture: table by table, row by row.
        axes: what changes along x, y and z, in a word.
        captions: of the cells; empty where rows and columns say all.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    tables: tuple[str, ...]
    cells: tuple[tuple[str, Settings], ...]
    axes: tuple[str, str, str] = ("", "", "")
    captions: tuple[str, ...] = ()

    @property
    def shared(self) -> str:
        """What all pictures have in common, in one line: prompt, styles, seed, steps, guidance, as far as they are."""
        every = [settings.as_dict() for _, settings in self.cells]
        same = {what: value for what, value in every[0].items() if all(each[what] == value for each in every)}
        styles = (
            f"{name} {strength_text(strength)}".rstrip()
            for name, strength in every[0]["mix"].items()
            if is_on(strength) and all(each["mix"].get(name) == strength for each in every)
        )
        negative = f"without {same['negative']}" if same.get("negative") else ""
        numbers = (f"{what} {same[what]:g}" for what in ("steps", "guidance") if what in same)
        seed = f"seed {same['seed']}" if "seed" in same else ""
        start = "from a picture" if same.get("start_image") else ""
        half = f"negative half {same['negative_mix']:g}" if same.get("negative_mix", 1) != 1 else ""
        return " · ".join(filter(None, (same.get("prompt", ""), negative, start, *styles, seed, *numbers, half)))


def row_of(cells: tuple[tuple[str, Settings], ...]) -> Sheet:
    """Pictures in one row, under their labels."""
    return Sheet(tuple(label for label, _ in cells), ("",), ("",), cells)
