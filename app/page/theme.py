"""Define how the app looks: theme, style sheet and the few pieces of HTML. Nothing is fetched from other servers."""

import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from app.insight.lora_timing import RANK, Timings
from app.settings.strengths import Strength, strength_text

REFUSALS_SHOWN = 3
CSS = Path(__file__).with_name("style.css")
SCRIPTS = [Path(__file__).parent / "js" / f"{name}.js" for name in ("roles", "addresses")]
PICTURES = (Path(__file__).parent / "js" / "pictures.js").read_text(encoding="utf-8")
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """Calm greys, one accent, and the fonts that the visitor's system has."""
    return gr.themes.Base(primary_hue="indigo", neutral_hue="zinc", radius_size="lg", font=SANS, font_mono=MONO).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="white",
        checkbox_background_color_selected="*primary_600",
        checkbox_background_color_selected_dark="*primary_600",
        slider_color="*primary_500",
    )


def scripts() -> str:
    """The JavaScript that runs once as the page opens."""
    return f"() => [{','.join(script.read_text(encoding='utf-8') for script in SCRIPTS)}].forEach((run) => run())"


def header(model: str, styles: int) -> str:
    """The page's title line."""
    count = f"{styles} style{'' if styles == 1 else 's'}"
    return f"<h1>SHiRA style studio</h1><p>{html.escape(model)} · {count}, mixed in place</p>"


def refusals(refused: Iterable[tuple[str, str]]) -> str:
    """Files that were left out, the first few with the reason."""
    refused = tuple(refused)
    shown, left = refused[:REFUSALS_SHOWN], len(refused) - REFUSALS_SHOWN
    items = "".join(f"<li><b>{html.escape(name)}</b>: {html.escape(reason)}</li>" for name, reason in shown)
    more = f"<li>and {left} more, see Library</li>" if left > 0 else ""
    return f"<p>Left out:</p><ul>{items}{more}</ul>"


def facts(report: Mapping[str, Any] | None, *, preview: bool = False) -> str:
    """What a picture took, from its report, which may be a stranger's; dashes before the first.

    Seed and time first; what the switch changed is in a fold.
    """
    labels = ("seed", f"to draw{', as a preview' * preview}", "to switch", "entries changed", "of weights changed")
    cells = [
        f"<div><b>{value}</b><span>{label}</span></div>"
        for value, label in zip(_measured(report or {}), labels, strict=True)
    ]
    switched = f"<details><summary>The switch</summary>{''.join(cells[2:])}</details>" if report else ""
    return "".join(cells[:2]) + switched


def tokens(count: int, most: int) -> str:
    """How much of what the model reads a prompt takes; nothing where that is unknown."""
    return f'<span class="{"over" if count > most else ""}">{count} of {most} tokens</span>' if most else ""


def _measured(report: Mapping[str, Any]) -> Iterable[str]:
    try:
        return (
            f'<button class="reuse" title="use this seed again">{report["seed"]:d}</button>',
            f"{report['generation_s']:.1f} s",
            milliseconds(report["switch_ms"]),
            f"{report['entries_changed']:,d}",
            f"{100 * report['share_changed']:.2f} %",
        )
    except (LookupError, TypeError, ValueError, OverflowError):
        return ("–",) * 5  # noqa: RUF001


def made(report: Mapping[str, Any]) -> str:
    """A line that says how a picture was made, from checked settings."""
    words = [f"“{report['prompt'][:300]}”"]
    if report["negative"]:
        words.append(f"without “{report['negative'][:300]}”")
    sides = [f"{side} {report[side]}" for side in ("width", "height") if report[side]]  # 0 is the model's own
    parts = [*words, caption(report), f"{report['steps']} steps", f"guidance {report['guidance']:g}", *sides]
    return f"<p>{html.escape(' · '.join(parts))}</p>"


def lora(timings: Timings | None) -> str:
    """What a switch and fusing a LoRA take here, in a fold."""
    if timings is None:
        return ""
    switch, fuse = map(milliseconds, (timings.switch, timings.fuse))
    return (
        "<details><summary>Switching beside fusing a LoRA</summary>"
        f"<p><b>{switch}</b> to switch to an adapter, <b>{fuse}</b> to fuse a LoRA of rank {RANK} into the same "
        f"weights: medians of {timings.runs} warm runs each, by turns, here at start-up.</p></details>"
    )


def milliseconds(value: float) -> str:
    """A time with two digits or more."""
    return f"{value:.2g} ms" if value < 10 else f"{value:.0f} ms"


def caption(report: Mapping[str, Any]) -> str:
    """A picture's line in the gallery: its mix."""
    return " + ".join(_styled(name, strength) for name, strength in report["mix"].items()) or "base"


def remark(text: str) -> str:
    """A line in a quiet voice."""
    return f'<p class="remark">{html.escape(text)}</p>'


def settings(report: Mapping[str, Any]) -> str:
    """How a picture was made, from its metadata, which may be a stranger's."""
    mix, weaker = report.get("mix"), report.get("negative_mix")
    sides = (report.get("width"), report.get("height"))
    lines = {
        "Prompt": report.get("prompt"),
        "Not wanted": report.get("negative") or None,
        "Styles": caption({"mix": mix}) if isinstance(mix, Mapping) else None,
        "Seed": report.get("seed"),
        "Steps": report.get("steps"),
        "Guidance": report.get("guidance"),
        "Merge": report.get("method"),
        "Size": size(*sides) if any(sides) else None,
        "Start": f"from a picture, changed by {report.get('change')}" if report.get("start_image") else None,
        "Negative half": f"{weaker} of the styles" if weaker not in (None, 1) else None,
        "Model": report.get("model"),
    }
    rows = (
        f"<dt>{name}</dt><dd>{html.escape(str(value)[:2000])}</dd>"
        for name, value in lines.items()
        if value is not None
    )
    return f'<dl class="settings">{"".join(rows)}</dl>'


def size(width: Any, height: Any) -> str:
    """Width and height; of 0 the model's own."""
    return f"{width or 'own'} × {height or 'own'}"  # noqa: RUF001


def plain(text: str) -> str:
    """Text for a message, which Gradio renders as HTML."""
    return html.escape(text, quote=False)


def _styled(name: str, strength: Strength) -> str:
    return f"{name} {strength_text(strength)}".rstrip()


def scroll_to(selector: str) -> str:
    """JavaScript that brings a part of the page into view, if it is not: on a phone it lies below what was pressed.

    It passes on what it is given.
    """
    shown = f"document.querySelector('{selector}').scrollIntoView({{ block: 'nearest', behavior: 'smooth' }})"
    return f"(...given) => {{ {shown}; return given }}"
