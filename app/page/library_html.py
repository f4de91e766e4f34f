"""Show what an adapter holds, as HTML. All text of files is escaped."""

from collections.abc import Iterable, Sequence
from html import escape

from app.library.cards import Card, shown_metadata
from shira_diffusers.cli.inspect import percent
from shira_diffusers.cli.terminal import printable
from shira_diffusers.formats.adapter_file import AdapterFile
from shira_diffusers.formats.block import Weight

LAYERS_SHOWN = 400


def inspection(card: Card, found: AdapterFile) -> str:
    """What ``shira inspect`` prints: the whole, the metadata, and each parameter's density as a bar."""
    facts = [
        ("Kind", found.kind + (f", format version {found.format_version}" if found.format_version else "")),
        ("Entries", f"{found.nnz:,}" + (f" of {found.numel:,}" if found.numel else "")),
        ("Density", percent(found.density) if found.numel else "unknown: not in the file"),
        ("Values", ", ".join(found.dtypes)),
        ("Size", f"{found.size:,} bytes, {found.bytes_per_entry or 0:.2f} per entry"),
        ("Knows its base", "yes, by a few of its values" if found.tells_base else "no"),
        ("SHA-256", card.sha256),
    ]
    metadata = sorted(shown_metadata(found.metadata).items())
    return (
        f'<div class="inspection"><h3>{escape(card.name)}</h3>{_list(facts)}'
        f"<h4>Metadata</h4>{_list(metadata) if metadata else '<p>None.</p>'}"
        f"<h4>Density by layer</h4>{_layers(found.parameters)}</div>"
    )


def _list(pairs: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>' for key, value in pairs)}</dl>"


def _layers(parameters: Sequence[Weight]) -> str:
    top = max((parameter.density or 0 for parameter in parameters), default=0) or 1
    rows = "".join(_layer(parameter, top) for parameter in parameters[:LAYERS_SHOWN])
    left = len(parameters) - LAYERS_SHOWN
    more = f"<p>and {left} more; shira inspect --all lists them</p>" if left > 0 else ""
    head = '<thead><tr><th scope="col">Layer</th><th scope="col">Density</th><th scope="col">Entries</th></tr></thead>'
    return f'<div class="layers" tabindex="0"><table>{head}<tbody>{rows}</tbody></table>{more}</div>'


def _layer(parameter: Weight, top: float) -> str:
    share = 100 * (parameter.density or 0) / top
    density = "?" if parameter.density is None else percent(parameter.density)
    bar = f'<span class="bar" style="width:{share:.1f}%"></span>'
    name = escape(printable(parameter.name))
    return f'<tr><th scope="row">{name}</th><td>{bar}<span>{density}</span></td><td>{parameter.nnz:,}</td></tr>'
