"""The site: links out of docs/ lead into the repository, plots follow the colours, drawings are the code's."""

import tomllib
from pathlib import Path
from types import SimpleNamespace

from docs import masks
from docs.hooks import on_config, on_page_markdown

CONFIG = SimpleNamespace(repo_url="https://example.org/us/it")
ROOT = Path(__file__).parents[1]


def built(markdown: str) -> str:
    return on_page_markdown(markdown, page=None, config=CONFIG, files=None)


def test_links_out_of_docs_lead_into_the_repository() -> None:
    assert built("[a](../LICENSE)") == "[a](https://example.org/us/it/blob/main/LICENSE)"
    assert built("[a](../assets/README.md#x)") == "[a](https://example.org/us/it/blob/main/assets/README.md#x)"
    assert built("[a](../examples/comfyui)") == "[a](https://example.org/us/it/tree/main/examples/comfyui)"
    assert built("[a](training.md#x) ![b](app.png)") == "[a](training.md#x) ![b](app.png)"


def test_without_a_repository_their_text_stays() -> None:
    page = on_page_markdown(
        "a [b c](../LICENSE), [d](x.md) ![e](../assets/styles.png)", None, SimpleNamespace(repo_url=None), None
    )
    assert page == "a b c, [d](x.md) ![e](assets/styles.png)"


def test_the_repository_is_the_packages() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert on_config(SimpleNamespace()).repo_url == urls.get("Repository")


def test_a_shared_picture_is_part_of_the_site() -> None:
    assert built("![a](../assets/styles.png)") == "![a](assets/styles.png)"


def test_plots_follow_the_colours() -> None:
    plot = '<picture><source media="(x)" srcset="p-dark.svg"><img src="p.svg" alt="A plot."></picture>'
    assert built(plot) == "![A plot.](p.svg#only-light)![A plot.](p-dark.svg#only-dark)"


def test_the_drawn_masks_are_those_of_the_code() -> None:
    assert masks.DRAWING.read_text(encoding="utf-8") == masks.drawing(), "stale: run python -m docs.masks"


def test_the_faq_quotes_the_benchmarks() -> None:
    """Each figure as it stands in docs/benchmarks.md, so that a new measurement makes the page stale."""
    measured = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    faq = (ROOT / "docs/faq.md").read_text(encoding="utf-8")
    for figure in ("0.994", "0.998", "1.04", "1.94", "0.918", "1.01", "7.09", "125"):
        assert figure in faq and figure in measured, figure
