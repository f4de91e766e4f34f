"""Draw contact sheets: a table of pictures as one picture, a label above each column, a line of text above each row."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP = 12, 6
LARGEST = 256  # pixels a side of a picture on the sheet
INK, PAPER = "#222222", "white"


def contact_sheet(
    columns: Sequence[str], rows: Sequence[str], pictures: Sequence[Sequence[Image.Image]]
) -> Image.Image:
    """Draw a labelled table.

    Args:
        columns: one label per column; what does not fit above a picture is cut.
        rows: one line of text per row, as wide as the sheet.
        pictures: ``pictures[row][column]``, all of one size; larger ones are scaled down to ``LARGEST``.

    Returns:
        RGB, on white.
    """
    width, height = _fit(pictures[0][0].size)
    bold, plain = ImageFont.load_default(15), ImageFont.load_default(12)
    head, line = 26, 20
    size = (
        2 * MARGIN + len(columns) * width + (len(columns) - 1) * GAP,
        2 * MARGIN + head + len(rows) * (line + height) + (len(rows) - 1) * GAP,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for k, label in enumerate(columns):
        middle = MARGIN + k * (width + GAP) + width // 2
        draw.text((middle, MARGIN + head // 2), shortened(label, bold, width), INK, bold, anchor="mm")
    for r, (text, row) in enumerate(zip(rows, pictures, strict=True)):
        top = MARGIN + head + r * (line + height + GAP)
        draw.text((MARGIN, top + line // 2), shortened(text, plain, size[0] - 2 * MARGIN), INK, plain, anchor="lm")
        for k, picture in enumerate(row):
            small = (
                picture
                if picture.size == (width, height)
                else picture.resize((width, height), Image.Resampling.LANCZOS)
            )
            sheet.paste(small.convert("RGB"), (MARGIN + k * (width + GAP), top + line))
    return sheet


def _fit(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, LARGEST / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, cut with dots where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
