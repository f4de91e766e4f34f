"""Draw a sheet as one picture: its pictures in rows and columns, with labels."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from app.settings.sheets import Sheet

MOST = 4096  # pixels of a side of all pictures together
PAD = 8
LINES = 4  # of a label
INK, SOFT, PAPER = "#18181b", "#52525b", "white"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def sheet_picture(sheet: Sheet, images: Sequence[Image.Image]) -> Image.Image:
    """All pictures of a sheet that were drawn, at least one, with the labels of rows, columns, tables and pictures.

    Pictures keep their size, unless the sheet were larger than 4096 pixels; each is in the middle of its place.
    """
    wide, high = len(sheet.columns), len(sheet.rows) * len(sheet.tables)
    share = min(
        1.0, MOST / (wide * max(image.width for image in images)), MOST / (high * max(i.height for i in images))
    )
    small = [ImageOps.scale(image.convert("RGB"), share) for image in images]
    return _Drawing(sheet, small).draw()


class _Drawing:
    def __init__(self, sheet: Sheet, images: Sequence[Image.Image]) -> None:
        self._sheet, self._images = sheet, images
        self._cell = max(image.width for image in images), max(image.height for image in images)
        self._font = _font(max(12, min(40, self._cell[0] // 12)))
        self._line = sum(self._font.getmetrics()) if isinstance(self._font, ImageFont.FreeTypeFont) else 12
        self._left = min(self._widest(sheet.rows), max(150, self._cell[0])) if any(sheet.rows) else 0
        self._width = self._left + PAD + len(sheet.columns) * (self._cell[0] + PAD)

    def draw(self) -> Image.Image:
        sheet = self._sheet
        per_table = len(sheet.rows) * len(sheet.columns)
        tables = [self._table(k * per_table, label) for k, label in enumerate(sheet.tables)]
        parts = [self._band(self._heading(), INK), *(part for table in tables for part in table)]
        whole = Image.new("RGB", (self._width, sum(part.height for part in parts) + PAD), PAPER)
        top = 0
        for part in parts:
            whole.paste(part, (0, top))
            top += part.height
        return whole

    def _heading(self) -> str:
        x, y, _ = self._sheet.axes
        axes = " · ".join(
            filter(None, (f"{x} from left to right" if x else "", f"{y} from top to bottom" if y else ""))
        )
        return "\n".join(filter(None, (self._sheet.shared, axes)))

    def _table(self, first: int, label: str) -> list[Image.Image]:
        """The table whose pictures begin with the one of this number; nothing where none of them was drawn."""
        sheet = self._sheet
        if first >= len(self._images):
            return []
        head = f"{sheet.axes[2]} {label}".strip() if label else ""
        wide = len(sheet.columns)
        rows = [
            self._row(first + k * wide, row) for k, row in enumerate(sheet.rows) if first + k * wide < len(self._images)
        ]
        return [*([self._band(head, INK)] if head else []), *([self._columns()] if any(sheet.columns) else []), *rows]

    def _band(self, text: str, ink: str) -> Image.Image:
        lines = [line for each in text.splitlines() for line in self._wrapped(each, self._width - 2 * PAD)]
        return self._written([(PAD, self._width - 2 * PAD, lines, ink, False)])

    def _columns(self) -> Image.Image:
        return self._under_columns(self._sheet.columns)

    def _row(self, first: int, label: str) -> Image.Image:
        images = self._images[first : first + len(self._sheet.columns)]
        captions = self._sheet.captions[first : first + len(images)]
        below = self._under_columns(captions)
        words = self._wrapped(label, self._left)
        beside = self._written([(PAD, self._left, words, SOFT, False)])
        row = Image.new("RGB", (self._width, max(PAD + self._cell[1] + below.height, beside.height)), PAPER)
        row.paste(beside, (0, 0))
        for k, image in enumerate(images):
            left, top = self._x(k) + (self._cell[0] - image.width) // 2, PAD + (self._cell[1] - image.height) // 2
            row.paste(image, (left, top))
        if captions:
            row.paste(below, (0, PAD + self._cell[1]))
        return row

    def _under_columns(self, labels: Sequence[str]) -> Image.Image:
        width = self._cell[0]
        return self._written(
            [(self._x(k), width, self._wrapped(each, width), SOFT, True) for k, each in enumerate(labels)]
        )

    def _written(self, texts: Sequence[tuple[int, int, list[str], str, bool]]) -> Image.Image:
        """Columns of text, each at its place, within its width, in its colour, in the middle or at the left."""
        most = max((len(lines) for _, _, lines, _, _ in texts), default=0)
        strip = Image.new("RGB", (self._width, most * self._line + (PAD if most else 0)), PAPER)
        pen = ImageDraw.Draw(strip)
        for left, width, lines, ink, middle in texts:
            for k, line in enumerate(lines):
                shift = int(width - self._font.getlength(line)) // 2 if middle else 0
                pen.text((left + shift, PAD // 2 + k * self._line), line, fill=ink, font=self._font)
        return strip

    def _x(self, column: int) -> int:
        return PAD + self._left + column * (self._cell[0] + PAD)

    def _widest(self, labels: Sequence[str]) -> int:
        return PAD + int(max(self._font.getlength(label) for label in labels))

    def _wrapped(self, text: str, width: int) -> list[str]:
        letters = max(6, int(width / self._font.getlength("abcdefghij") * 10))
        return textwrap.wrap(text, letters, max_lines=LINES, placeholder=" …")


def _font(size: int) -> Font:
    """A font that has most alphabets where the system has one; Pillow's own has Latin letters only."""
    for name in ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
