"""How the app looks: theme, style sheet and the few pieces of HTML. Nothing is fetched from other servers."""

import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from app.cards import Card

CSS = Path(__file__).with_name("style.css")
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """Calm greys, one accent, and the fonts that the visitor's system has."""
    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="zinc",
        radius_size="lg",
        font=SANS,
        font_mono=MONO,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        checkbox_background_color_selected="*primary_600",
        checkbox_background_color_selected_dark="*primary_600",
        slider_color="*primary_500",
    )


def header(model: str, styles: int) -> str:
    """The page's title line."""
    count = f"{styles} style{'' if styles == 1 else 's'}"
    return f"<h1>SHiRA style studio</h1><p>{html.escape(model)} · {count}, mixed in place</p>"


def hint(card: Card) -> str:
    """A line on an adapter: its share, the words that it was trained with; what loading it warned of, if anything."""
    words = f" · trained on “{card.trigger}”" if card.trigger else ""
    line = html.escape(f"{100 * card.density:.2g} % of weights{words}")
    note = f"<p>⚠ {html.escape(card.note)}</p>" if card.note else ""
    return f'<p class="line" title="{line} · {card.megabytes:.2g} MB">{line}</p>{note}'


def refusals(refused: Iterable[tuple[str, str]]) -> str:
    """Files that were left out, each with the reason."""
    items = "".join(f"<li><b>{html.escape(name)}</b> {html.escape(reason)}</li>" for name, reason in refused)
    return f"<p>Left out, as they do not fit this model:</p><ul>{items}</ul>"


def facts(report: Mapping[str, Any]) -> str:
    """What a generation took, from its report."""
    switch = report["switch_ms"]
    cells = [
        (f"{switch:.2g} ms" if switch < 10 else f"{switch:.0f} ms", "to switch"),
        (f"{100 * report['share_changed']:.2f} %", "of weights changed"),
        (f"{report['generation_s']:.1f} s", "to draw"),
        (str(report["seed"]), "seed"),
    ]
    return "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in cells)


def caption(report: Mapping[str, Any]) -> str:
    """A picture's line in the gallery: its mix."""
    return " + ".join(_styled(name, strength) for name, strength in report["mix"].items()) or "base"


def _styled(name: str, strength: float) -> str:
    return name if strength == 1 else f"{name} {strength:g}"
