"""The page, put together: header, tabs, endpoints."""

from typing import Any

import gradio as gr

from app.api.described_page import DescribedPage
from app.api.library import add_library_api
from app.api.pictures import add_api, add_pictures_api
from app.api.sheets import add_sheets_api
from app.api.training import add_training_api
from app.page import theme
from app.page.tabs.compare import CompareTab
from app.page.tabs.history import HistoryTab
from app.page.tabs.interference import InterferenceTab
from app.page.tabs.library import LibraryTab
from app.page.tabs.mix import MixTab
from app.page.tabs.series import SeriesTab
from app.page.tabs.train import TrainTab
from app.server.visitors import visitor_of
from app.studio import Studio

CACHE_SECONDS = 24 * 60 * 60  # pictures not fetched for a day are deleted from the disk


def build(studio: Studio) -> gr.Blocks:
    """The app over a studio, to be served with ``launch``."""
    with DescribedPage(
        title="SHiRA style studio", analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as blocks:
        session = studio.session
        header = gr.HTML(theme.header(session.model, len(session.cards)), elem_id="header", padding=False)
        with gr.Tabs(elem_id="tabs") as row:
            mix = MixTab(studio, row, header, blocks.load)
            compare, series, kept = CompareTab(studio, mix), SeriesTab(studio, mix, row), HistoryTab(studio, mix)
            train = TrainTab(studio, mix)
            tabs: dict[str, Any] = {
                "Mix": mix,
                "Compare": compare,
                "Series": series,
                "Interference": InterferenceTab(studio, mix),
                "Train": train,
                "Library": LibraryTab(studio),
                "History": kept,
            }
            for name, tab in tabs.items():
                with gr.Tab(name, id=name.lower()) as shown:
                    tab.lay_out()
                if hasattr(tab, "refresh_on"):
                    tab.refresh_on(shown)
        series.keep_in_browser(blocks.load)
        train.keep_in_browser(blocks.load)
        for results in (compare.results, series.results):
            series.vary_on(results.view.more, results.names)
        series.vary_on(kept.more.click, kept.chosen)
        series.vary_on(mix.more_like.click, mix.shown)
        add_api(studio)
        add_pictures_api(studio)
        add_sheets_api(studio)
        add_library_api(studio)
        add_training_api(studio)

        def leave(request: gr.Request) -> None:
            """End what a page or a client that is gone waits for."""
            studio.requests.stop(visitor_of(request).visit)

        blocks.unload(leave)
    return blocks


def launch(blocks: gr.Blocks, host: str, port: int, **options: Any) -> str:
    """Serve the app; returns its address (at once, if ``prevent_thread_lock=True`` is among the options)."""
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        theme=theme.theme(),
        js=theme.scripts(),
        css_paths=[theme.CSS, *sorted(theme.CSS.parent.glob("css/*.css"))],
        footer_links=["api"],
        ssr_mode=False,
        **{"share": False, **options},
    )
    return url
